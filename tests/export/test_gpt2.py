"""Exporting to GPT-2 and loading from GPT-2: each side loads what the other saved, and no weight changes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from configuration_minigpt import MiniGPTConfig
from minigpt.cli import main
from minigpt.export.gpt2 import export_gpt2
from minigpt.modeling.gpt2 import gpt2_state_dict
from minigpt.utils.errors import UserError
from modeling_minigpt import MiniGPTForCausalLM

IDS = torch.arange(48).view(2, 24) % 40


def save_minigpt(folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> MiniGPTForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "max_position_embeddings": 32}
    model = MiniGPTForCausalLM(MiniGPTConfig(vocab_size=40, **shape, **options))
    with torch.no_grad():  # biases start at 0 and norms at 1; equal values would hide an exchange
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
    model = save_minigpt(tmp_path / "minigpt", **options)
    export_gpt2(tmp_path / "minigpt", tmp_path / "stock")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    assert type(stock) is GPT2LMHeadModel
    # tolerance: the same arithmetic, with float32 operations in another order
    torch.testing.assert_close(stock(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_exported_and_reimported_weights_are_bit_identical(tmp_path: Path, dtype: torch.dtype) -> None:
    model = save_minigpt(tmp_path / "minigpt", dtype)
    export_gpt2(tmp_path / "minigpt", tmp_path / "stock")
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
    minigpt = MiniGPTForCausalLM.from_pretrained(tmp_path / "stock")
    exported = gpt2_state_dict(minigpt)
    assert exported.keys() == stock.state_dict().keys()
    for name, tensor in stock.state_dict().items():
        assert torch.equal(exported[name], tensor), name


def test_exported_folder_needs_no_code_of_minigpt(tmp_path: Path) -> None:
    save_minigpt(tmp_path / "minigpt")
    export_gpt2(tmp_path / "minigpt", tmp_path / "stock")
    config = json.loads((tmp_path / "stock" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "gpt2"
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert "auto_map" not in config
    assert not list((tmp_path / "stock").glob("*.py"))
    assert AutoTokenizer.from_pretrained(tmp_path / "stock").get_vocab()["z"] == 25
    assert "transformer.h.0.attn.c_attn.weight" in load_file(tmp_path / "stock" / "model.safetensors")


def test_options_that_gpt2_lacks_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_minigpt(tmp_path / "minigpt", qkv_bias=False, tie_word_embeddings=False)
    main(["export", "gpt2", str(tmp_path / "minigpt"), str(tmp_path / "stock")])
    printed = capsys.readouterr().out
    assert "they are zero" in printed
    assert "tie_word_embeddings=False" in printed
    assert f"{tmp_path / 'stock'} is a stock GPT-2" in printed


def test_export_refuses_a_full_destination_and_a_source_without_a_model(tmp_path: Path) -> None:
    save_minigpt(tmp_path / "minigpt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("a long text", encoding="utf-8")
    with pytest.raises(UserError, match="is not empty"):
        export_gpt2(tmp_path / "minigpt", tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match=r"config\.json"):
        export_gpt2(tmp_path / "full", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_export_refuses_a_model_that_is_no_minigpt(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="is a LlamaForCausalLM; only a MiniGPT can be exported"):
        export_gpt2(tmp_path / "llama", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_run_without_a_final_model_exports_its_newest_checkpoint(tmp_path: Path) -> None:
    save_minigpt(tmp_path / "run" / "checkpoint-5")
    newest = save_minigpt(tmp_path / "run" / "checkpoint-10", intermediate_size=50)
    export_gpt2(tmp_path / "run", tmp_path / "stock")
    back = MiniGPTForCausalLM.from_pretrained(tmp_path / "stock")
    assert back.config.intermediate_size == 50
    assert torch.equal(back(IDS).logits, newest(IDS).logits)


def test_a_model_without_a_tokenizer_is_exported_with_the_names_that_converters_read(tmp_path: Path) -> None:
    save_minigpt(tmp_path / "minigpt")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "minigpt" / name).unlink()
    assert any("no tokenizer" in note for note in export_gpt2(tmp_path / "minigpt", tmp_path / "stock"))
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config["n_ctx"] == config["n_positions"] == 32
