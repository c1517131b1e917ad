"""GPT-2 both ways: what transformers' GPT-2 saves we load, what we export it loads, and no number changes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from configuration_minigpt import MiniGPTConfig
from minigpt.cli import main
from minigpt.export.gpt2 import export_gpt2
from minigpt.modeling.gpt2 import gpt2_state_dict
from modeling_minigpt import MiniGPTForCausalLM

IDS = torch.arange(48).view(2, 24) % 40


def save_minigpt(folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> MiniGPTForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "max_position_embeddings": 32}
    model = MiniGPTForCausalLM(MiniGPTConfig(vocab_size=40, **shape, **options))
    with torch.no_grad():  # biases and norms start at 0 and 1, where a mix-up would not show
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).eval().save_pretrained(folder)
    letters = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz0123456789 .,?")}
    core = Tokenizer(models.WordLevel(letters, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?").save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "options",
    [{}, {"qkv_bias": False}, {"tie_word_embeddings": False}, {"intermediate_size": 50, "layer_norm_epsilon": 1e-6}],
    ids=["gpt2", "no_qkv_bias", "untied", "other_sizes"],
)
def test_export_gives_the_same_logits_through_stock_gpt2(tmp_path: Path, options: dict) -> None:
    model = save_minigpt(tmp_path / "ours", **options)
    export_gpt2(tmp_path / "ours", tmp_path / "stock")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    assert type(stock) is GPT2LMHeadModel
    # the same arithmetic in another order of float32 operations
    torch.testing.assert_close(stock(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_exported_and_reimported_weights_are_bit_identical(tmp_path: Path, dtype: torch.dtype) -> None:
    model = save_minigpt(tmp_path / "ours", dtype)
    export_gpt2(tmp_path / "ours", tmp_path / "stock")
    back = MiniGPTForCausalLM.from_pretrained(tmp_path / "stock", dtype="auto")
    assert back.dtype is dtype
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_loading_and_exporting_gpt2_changes_no_bit(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=40, n_positions=32, n_embd=24, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=0)
    stock = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    stock.save_pretrained(tmp_path / "stock")
    ours = MiniGPTForCausalLM.from_pretrained(tmp_path / "stock")
    exported = gpt2_state_dict(ours)
    assert exported.keys() == stock.state_dict().keys()
    for name, tensor in stock.state_dict().items():
        assert torch.equal(exported[name], tensor), name


def test_exported_folder_is_stock(tmp_path: Path) -> None:
    save_minigpt(tmp_path / "ours")
    export_gpt2(tmp_path / "ours", tmp_path / "stock")
    config = json.loads((tmp_path / "stock" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "gpt2"
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert "auto_map" not in config
    assert not list((tmp_path / "stock").glob("*.py"))
    assert AutoTokenizer.from_pretrained(tmp_path / "stock").get_vocab()["z"] == 25
    assert "transformer.h.0.attn.c_attn.weight" in load_file(tmp_path / "stock" / "model.safetensors")


def test_options_gpt2_spells_otherwise_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_minigpt(tmp_path / "ours", qkv_bias=False, tie_word_embeddings=False)
    main(["export", "gpt2", str(tmp_path / "ours"), str(tmp_path / "stock")])
    said = capsys.readouterr().out
    assert "they are zero" in said
    assert "tie_word_embeddings=False" in said


def test_export_overwrites_nothing_and_names_what_is_missing(tmp_path: Path) -> None:
    save_minigpt(tmp_path / "ours")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match="is not empty"):
        export_gpt2(tmp_path / "ours", tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match=r"no config\.json"):
        export_gpt2(tmp_path / "full", tmp_path / "new")
    assert not (tmp_path / "new").exists()
