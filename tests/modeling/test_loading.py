"""Laws of `load_model`: which class a folder becomes, which folder is loaded, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from minigpt.modeling.loading import find_model, load_model
from minigpt.modeling.packed_linear import PackedLinear
from minigpt.utils.errors import UserError
from modeling_minigpt import MiniGPTForCausalLM
from support.tiny import tiny_model

IDS = torch.arange(20)[None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("pack", [False, True])
def test_a_minigpt_is_loaded_for_evaluation_with_the_same_function(folder: Path, pack: bool) -> None:
    model = load_model(folder, device="cpu", pack=pack)
    assert isinstance(model, MiniGPTForCausalLM)
    assert not any(module.training for module in model.modules())
    assert isinstance(model.lm_head, PackedLinear) == pack
    # packed matrices change the order of float32 sums
    torch.testing.assert_close(model(IDS).logits, tiny_model()(IDS).logits, atol=1e-5, rtol=1e-5)
    assert load_model(str(folder), dtype="bfloat16", device="cpu").dtype is torch.bfloat16


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_gpt2_becomes_a_minigpt_unless_it_has_options_that_minigpt_lacks(tmp_path: Path, by_layer: bool) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=3, n_head=2, scale_attn_by_inverse_layer_idx=by_layer
    )
    gpt2 = GPT2LMHeadModel(config).eval()
    gpt2.save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu")
    assert type(model) is (GPT2LMHeadModel if by_layer else MiniGPTForCausalLM)
    torch.testing.assert_close(model(IDS).logits, gpt2(IDS).logits, atol=1e-5, rtol=1e-5)


def test_other_options_reach_the_model(folder: Path) -> None:
    model = load_model(folder, device="cpu", attn_implementation="eager", resid_pdrop=0.3)
    assert model.config._attn_implementation == "eager"
    assert model.transformer.layers[0].mlp.resid_dropout.p == 0.3


def test_other_architectures_keep_their_class(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape)).eval()
    llama.save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu", pack=True)
    assert torch.equal(model(IDS).logits, llama(IDS).logits)


def test_a_run_without_a_final_model_gives_its_newest_checkpoint(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    for step in (9, 10):
        (run_dir / f"checkpoint-{step}").mkdir(parents=True)
        (run_dir / f"checkpoint-{step}" / "config.json").touch()
    (run_dir / "checkpoint-11").mkdir()  # without a model
    assert find_model(run_dir) == str(run_dir / "checkpoint-10")
    assert "checkpoint-10" in capsys.readouterr().err
    (run_dir / "config.json").touch()
    assert find_model(run_dir) == str(run_dir)


def remove_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("transformer.norm.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_config(**values: object) -> Callable[[Path], None]:
    """A function that changes values in the config.json of a folder."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_a_weight, r"is incomplete: 1 weights are missing, for example transformer\.norm\.weight"),
        (change_config(num_hidden_layers=1), r"has \d+ weights that its config.json has no place for, for example "),
        (change_config(vocab_size=300), "cannot be loaded"),
        (change_config(num_attention_heads=3), "hidden_size=16 is not divisible by num_attention_heads=3"),
        (change_config(vocab_size="many"), "vocab_size"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "unknown"}'), "unknown"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
    ],
)
def test_damaged_models_are_user_errors(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    verbosity = logging.get_verbosity()
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder, device="cpu")
    assert str(caught.value).startswith(f"model={folder} ")
    assert len(str(caught.value).splitlines()) == 1
    assert logging.get_verbosity() == verbosity


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{}/none", "no such folder"),
        ("./none", "no such folder$"),
        ("a/b/none", "no such folder$"),
        ("model/none", "no such folder$"),
        ("{}", r"neither config\.json nor a checkpoint"),
        ("{}/model/config.json", "is a file"),
        ("someone/nothing", "no such folder, and not found on the Hub"),  # not in the cache, and the tests are offline
    ],
)
def test_models_that_do_not_exist_are_user_errors(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(folder.parent)
    with pytest.raises(UserError, match=message):
        load_model(name.format(folder.parent), device="cpu")


@pytest.mark.parametrize("device", ["fax", "cuda:99"])
def test_a_missing_device_is_a_user_error_before_weights_are_read(folder: Path, device: str) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"device={device} cannot be used"):
        load_model(folder, device=device)
