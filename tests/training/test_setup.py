"""Laws of the model of a run: only a MiniGPT or GPT-2 is accepted, and the options decide its dropout and dtype."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from minigpt.config.parser import parse_arguments
from minigpt.training.setup import build_model
from minigpt.utils.errors import UserError
from modeling_minigpt import MiniGPTForCausalLM
from support.tiny import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer(eos_token="<|endoftext|>")


def build(folder: Path, *options: str) -> MiniGPTForCausalLM:
    words = ["--model_name_or_path", str(folder), "--train_file", "text.txt", "--block_size", "16", *options]
    return build_model(parse_arguments(words), TOKENIZER, None)


def test_a_model_of_another_architecture_is_refused(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **shape)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="LlamaForCausalLM; only a MiniGPT or GPT-2 can be trained"):
        build(tmp_path)


def test_a_pretrained_model_is_trained_in_float32_with_the_given_dropout(tmp_path: Path) -> None:
    tiny_model().bfloat16().save_pretrained(tmp_path)
    model = build(tmp_path, "--dropout", "0.3")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.3}
    assert model.config.attn_pdrop == 0.3
