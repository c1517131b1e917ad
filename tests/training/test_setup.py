"""Laws of the model of a run: only a MiniGPT or GPT-2 is accepted, and the options decide its dropout and dtype."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from minigpt.config.parser import parse_arguments
from minigpt.data.datamodule import load_data
from minigpt.data.tokenizer import load_tokenizer, tokenizer_hash
from minigpt.training.setup import build_model
from minigpt.utils.errors import UserError
from modeling_minigpt import MiniGPTForCausalLM
from support.tiny import byte_tokenizer, tiny_model

ISOLATED = """
import sys
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert "minigpt" not in sys.modules
assert "configuration_minigpt" not in " ".join(sys.modules), "code of the model was run"
batch = tokenizer(["long " * 100, "short"], truncation=True, padding=True)
print([len(ids) for ids in batch["input_ids"]], tokenizer.pad_token, tokenizer("a short text")["input_ids"])
"""

TOKENIZER = byte_tokenizer(eos_token="<|endoftext|>")


def build(folder: Path, *options: str) -> MiniGPTForCausalLM:
    words = ["--model_name_or_path", str(folder), "--train_file", "text.txt", "--block_size", "16", *options]
    return build_model(parse_arguments(words), TOKENIZER, None)


def test_a_model_of_another_architecture_is_refused(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **shape)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="LlamaForCausalLM; only a MiniGPT or GPT-2 can be trained"):
        build(tmp_path)


def test_a_new_model_that_no_memory_holds_is_refused_before_it_is_built() -> None:
    words = ["--train_file", "text.txt", "--hidden_size", "262144", "--num_hidden_layers", "10"]
    with pytest.raises(UserError, match=r"hidden_size=262144, .*: the weights take 32986.7 GB, and .* can be used"):
        build_model(parse_arguments([*words, "--num_attention_heads", "1024"]), TOKENIZER, None)


def test_a_pretrained_model_is_trained_in_float32_with_the_given_dropout(tmp_path: Path) -> None:
    tiny_model().bfloat16().save_pretrained(tmp_path)
    model = build(tmp_path, "--dropout", "0.3")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.3}
    assert model.config.attn_pdrop == 0.3


def test_the_tokenizer_of_a_model_truncates_and_pads_for_a_process_without_minigpt(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>")
    before, hash_before = tokenizer("a short text")["input_ids"], tokenizer_hash(tokenizer)
    words = ["--train_file", "text.txt", "--block_size", "16", "--hidden_size", "16", "--num_attention_heads", "2"]
    model = build_model(parse_arguments([*words, "--num_hidden_layers", "1"]), tokenizer, None)
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    model.save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    assert "auto_map" in (tmp_path / "run" / "config.json").read_text()
    assert tokenizer_hash(load_tokenizer(tmp_path / "run")) == hash_before
    command = [sys.executable, "-I", "-c", ISOLATED, str(tmp_path / "run")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].endswith(f"[16, 16] <|endoftext|> {before}")


@pytest.mark.parametrize("option", ["--model_name_or_path", "--tokenizer", "--dataset_name"])
@pytest.mark.parametrize("name", ["./run/quikstart", "run/quikstart", "~/quikstart", "a/b/c"])
def test_a_mistyped_folder_is_named_and_not_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, name: str
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "text.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: pytest.fail("the network was used"))
    source = [] if option == "--dataset_name" else ["--train_file", "text.txt"]
    args = parse_arguments([*source, option, name, "--cache_dir", str(tmp_path / "cache")])
    with pytest.raises(UserError, match=rf"^{option[2:]}=.*: no such folder$"):
        load_data(args)
