"""Laws of LoRA adapters: PEFT computes the same, loads ours, and what it does not vouch for is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt.cli import main
from minigpt.config.parser import parse_arguments
from minigpt.export.merge import export_merged
from minigpt.modeling.activation_checkpointing import enable_activation_checkpointing
from minigpt.modeling.loading import find_model, load_model
from minigpt.modeling.lora import ADAPTER, add_adapter, config_source, save_adapter
from minigpt.modeling.loss import in_place_cross_entropy
from minigpt.utils.errors import UserError
from modeling_minigpt import MiniGPTForCausalLM
from support.tensors import different_tensors
from support.tiny import byte_tokenizer, tiny_model

IDS = torch.arange(60).view(3, 20) % 50
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def options(base: Path | str, *words: str) -> Any:
    return parse_arguments(["--model_name_or_path", str(base), "--train_file", "x.txt", "--use_peft", *words])


def save_base(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    tiny_model().to(dtype).save_pretrained(folder)
    return folder


def trained_adapter(base: Path, *words: str) -> MiniGPTForCausalLM:
    """The model of `base` with an adapter of random weights."""
    model = load_model(base, device="cpu")
    assert isinstance(model, MiniGPTForCausalLM)
    torch.manual_seed(1)
    add_adapter(model, options(base, *words))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.05)
    return model.eval()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """A saved adapter with a tokenizer and a generation config of its own."""
    model = trained_adapter(base, "--use_rslora", "--lora_r", "4")
    model.generation_config.suppress_tokens = [7]
    model.save_pretrained(tmp_path / "adapter")
    byte_tokenizer(eos_token="<|endoftext|>").save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("checkpointing", ["no", "selective", "full"])
@pytest.mark.parametrize("targets", [ALL, ["v_proj", "q_proj"]], ids=["all", "two"])
def test_loss_and_gradients_are_those_of_peft(base: Path, targets: list[str], checkpointing: Any) -> None:
    """With the in-place loss and activation checkpointing here, and PEFT's own wrapper and the usual loss there."""
    ours = load_model(base, device="cpu")
    torch.manual_seed(1)
    words = [] if targets == ALL else ["--lora_target_modules", *targets]
    add_adapter(ours, options(base, "--lora_r", "4", *words))
    ours.loss_function = in_place_cross_entropy
    enable_activation_checkpointing(ours, checkpointing)
    config = peft.LoraConfig(r=4, lora_alpha=32, lora_dropout=0.05, target_modules=targets)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(load_model(base, device="cpu"), config)
    losses = []
    for model in (ours, theirs):
        torch.manual_seed(2)  # of dropout
        model.train()
        for name, weight in model.named_parameters():
            if ".lora_B." in name:  # otherwise A has no gradient
                torch.nn.init.normal_(weight, std=0.1)
        loss = model(IDS, labels=IDS, num_items_in_batch=57).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    expected = {name: weight.grad for name, weight in theirs.named_parameters() if weight.requires_grad}
    actual = {name: weight.grad for name, weight in ours.named_parameters() if weight.requires_grad}
    assert len(actual) == 2 * 2 * len(targets)
    assert {f"base_model.model.{name}" for name in actual} == expected.keys()
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[f"base_model.model.{name}"], atol=1e-6, rtol=1e-4)
        assert gradient.any()
    assert all(weight.grad is None for weight in ours.parameters() if not weight.requires_grad)


def test_a_new_adapter_changes_no_logit_and_freezes_everything_else(base: Path) -> None:
    model = load_model(base, device="cpu")
    add_adapter(model, options(base))
    assert torch.equal(model(IDS).logits, tiny_model()(IDS).logits)
    assert type(model) is MiniGPTForCausalLM
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name}


def test_peft_loads_a_saved_adapter_whole_and_computes_and_merges_the_same(base: Path, adapter: Path) -> None:
    expected = trained_adapter(base, "--use_rslora", "--lora_r", "4")(IDS).logits
    assert not torch.allclose(expected, tiny_model()(IDS).logits, atol=0.01)
    names = {path.name for path in adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "generation_config.json", "tokenizer.json"} <= names
    assert not [name for name in names if name == "config.json" or name.endswith(".py") or name.startswith("model")]
    wrapped = peft.PeftModel(load_model(base, device="cpu"), peft.PeftConfig.from_pretrained(adapter))
    result = wrapped.load_adapter(adapter, ADAPTER, torch_device="cpu")
    assert result.missing_keys == result.unexpected_keys == []
    assert torch.equal(wrapped(IDS).logits, expected)
    ours = load_model(adapter, device="cpu")
    # tolerance: one product with the sum of two matrices instead of a sum of products
    torch.testing.assert_close(ours(IDS).logits, expected, atol=1e-5, rtol=0)
    theirs = wrapped.merge_and_unload().state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.state_dict().items())
    assert ours.generation_config.suppress_tokens == [7]


def test_peft_alone_finds_base_and_code_from_any_folder(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)
    torch.testing.assert_close(model(IDS).logits, load_model(adapter, device="cpu")(IDS).logits, atol=1e-5, rtol=0)


def test_save_adapter_writes_the_files_of_save_pretrained(base: Path, tmp_path: Path) -> None:
    model = trained_adapter(base)
    model.save_pretrained(tmp_path / "theirs")
    save_adapter(model, tmp_path / "ours", model.state_dict())
    assert different_tensors(tmp_path / "ours", tmp_path / "theirs", "adapter_model.safetensors") == []
    for path in (tmp_path / "theirs").iterdir():
        assert path.suffix == ".safetensors" or path.read_text() == (tmp_path / "ours" / path.name).read_text()
    assert len(list((tmp_path / "ours").iterdir())) == len(list((tmp_path / "theirs").iterdir())) == 3


def test_a_base_on_the_hub_is_recorded_by_its_name(base: Path, tmp_path: Path) -> None:
    model = load_model(base, device="cpu")
    model.name_or_path = "ann/base"
    add_adapter(model, options(base))
    save_adapter(model, tmp_path / "adapter", model.state_dict())
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "ann/base"
    assert saved["target_modules"] == ALL  # in the order of the model, so that the file is always the same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_writes_a_whole_model_whose_weights_were_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    base = save_base(tmp_path / "base", dtype)
    model = trained_adapter(base).float()
    model.save_pretrained(tmp_path / "adapter")
    byte_tokenizer(eos_token="<|endoftext|>").save_pretrained(tmp_path / "adapter")
    main(["merge", str(tmp_path / "adapter"), str(tmp_path / "whole")])
    whole = load_model(tmp_path / "whole", device="cpu")
    assert whole.dtype == dtype
    layer, merged = model.transformer.layers[0].mlp.up_proj, whole.transformer.layers[0].mlp.up_proj
    assert torch.equal(merged.weight, (layer.base_layer.weight + layer.get_delta_weight(ADAPTER)).to(dtype))
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {"config.json", "modeling_minigpt.py", "tokenizer.json", "generation_config.json"} <= names
    assert not [name for name in names if "adapter" in name]
    if dtype == torch.float32:
        torch.testing.assert_close(whole(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)
    # loaded in another dtype, the weights are rounded after the merge as well
    as_bfloat16 = load_model(tmp_path / "adapter", dtype="bfloat16", device="cpu")
    assert torch.equal(as_bfloat16.transformer.layers[0].mlp.up_proj.weight, merged.weight.bfloat16())


def test_merge_refuses_a_whole_model_and_a_folder_that_is_not_empty(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a whole model already"):
        export_merged(base, tmp_path / "new")
    with pytest.raises(UserError, match="is not empty"):
        export_merged(adapter, base)
    assert not (tmp_path / "new").exists()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "an adapter of type IA3; only LORA"),
        ({"base_model_name_or_path": "/gone/base"}, "its base model /gone/base is gone; put it back, or write"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.* is not supported"),
        ({"megatron_config": {"x": 1}, "megatron_core": "payload"}, "megatron_config=.* is not supported"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication=.* is not supported"),
        ({"field_of_a_later_peft": "x"}, "field_of_a_later_peft=x .* is not supported"),
        ({"target_modules": ["c_attn"]}, "cannot be loaded: .*c_attn"),
        ({"r": 5}, "cannot be loaded: .*size"),
        ({"r": "many"}, "cannot be loaded"),
        ({"target_modules": ["q_proj"]}, "does not fit: unknown are 20 weights, for example"),
        ({"target_modules": [*ALL, "lm_head"]}, "adapts one use of an embedding that is also the head"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_adapter_that_cannot_be_trusted_or_understood_is_refused_in_one_line(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "payload.py").write_text("raise SystemExit('the code of an adapter was run')")
    monkeypatch.syspath_prepend(tmp_path)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message) as caught:
        load_model(adapter, device="cpu")
    assert "\n" not in str(caught.value)
    assert "payload" not in sys.modules


def test_weights_of_an_adapter_are_read_from_safetensors_only(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    torch.save(weights, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").rename(adapter / "other.safetensors")
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        load_model(adapter, device="cpu")
    name = min(weights)
    rest = {other: weight for other, weight in weights.items() if other != name}
    save_file(rest, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="lacks 1 weights, for example transformer"):
        load_model(adapter, device="cpu")
    save_file({**weights, name: weights[name] * float("nan")}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="holds a NaN"):
        load_model(adapter, device="cpu")


def test_an_adapter_on_the_hub_is_loaded_from_the_cache_without_a_network(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("base", "adapter"):
        (tmp_path / f"models--ann--{name}" / "refs").mkdir(parents=True)
        (tmp_path / f"models--ann--{name}" / "refs" / "main").write_text("0" * 40)
    snapshots = [tmp_path / f"models--ann--{name}" / "snapshots" / ("0" * 40) for name in ("base", "adapter")]
    tiny_model().save_pretrained(snapshots[0])
    model = trained_adapter(base)
    model.peft_config[ADAPTER].base_model_name_or_path = "ann/base"
    save_adapter(model, snapshots[1], model.state_dict())
    assert find_model("ann/adapter") == "ann/adapter"
    assert config_source("ann/adapter") == "ann/base"
    loaded = load_model("ann/adapter", device="cpu")
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)


def test_an_adapter_of_an_adapter_is_refused_and_merging_it_is_the_way_out(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(adapter)}
    (tmp_path / "second" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is an adapter itself; merge it with minigpt merge"):
        load_model(tmp_path / "second", device="cpu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--use_peft"], "use_peft adapts an existing model"),
        (["--lora_r", "8"], "lora_r=8: only an adapter has these options; add use_peft"),
        (["--use_peft", "--model_name_or_path", "x", "--lora_r", "0"], "lora_r=0 must be a number of at least 1"),
        (["--use_peft", "--model_name_or_path", "x", "--lora_dropout", "1"], "lora_dropout=1.0 must be"),
        (["--use_peft", "--model_name_or_path", "x", "--optimizer", "muon"], "use optimizer=adamw"),
        (["--use_peft", "--model_name_or_path", "x", "--pad_vocab_size_to_multiple_of", "8"], "drop it or use_peft"),
    ],
)
def test_options_that_do_not_fit_an_adapter_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_arguments(["--train_file", "x.txt", *words])


def test_a_module_that_the_model_lacks_is_refused_with_the_names_it_has(base: Path) -> None:
    args = options(base, "--lora_target_modules", "q_proj", "c_attn", "wte")
    with pytest.raises(UserError) as caught:
        add_adapter(load_model(base, device="cpu"), args)
    expected = f"lora_target_modules=c_attn wte: no such linear layer; the model has {', '.join(ALL)}"
    assert str(caught.value) == expected


def test_defaults_of_the_lora_options_may_be_given_without_use_peft() -> None:
    words = ["--train_file", "x.txt"]
    given = parse_arguments([*words, "--lora_r", "16", "--lora_alpha", "32", "--lora_dropout", "0.05"])
    assert given == parse_arguments(words)


def test_a_model_without_an_adapter_is_saved_as_before(base: Path, tmp_path: Path) -> None:
    load_model(base, device="cpu").save_pretrained(tmp_path / "again")
    assert different_tensors(base, tmp_path / "again") == []
    assert {path.name for path in base.iterdir()} == {path.name for path in (tmp_path / "again").iterdir()}
