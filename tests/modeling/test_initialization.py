"""Laws of the initial weights: `initializer_gain` makes them those of GPT-2 124M at any width."""

import math

import pytest
import torch

from configuration_minigpt import MiniGPTConfig
from minigpt.modeling.initialization import INPUT_MATRICES, scale_input_matrices
from modeling_minigpt import MiniGPTForCausalLM


def new_model(hidden_size: int) -> MiniGPTForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": hidden_size, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
    return MiniGPTForCausalLM(MiniGPTConfig(max_position_embeddings=8, **shape))


@pytest.mark.parametrize("hidden_size", [64, 256])
def test_input_matrices_get_the_gain_and_nothing_else_changes(hidden_size: int) -> None:
    before, model = new_model(hidden_size), new_model(hidden_size)
    scale_input_matrices(model, gain=0.5, initializer_range=0.02)
    for (name, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        if any(name.endswith(f"{matrix}.weight") for matrix in INPUT_MATRICES):
            # the deviation of n samples is off by 1 / sqrt(2n)
            assert new.std().item() == pytest.approx(0.5 / math.sqrt(hidden_size), rel=0.05)
        else:
            assert torch.equal(old, new), name


def test_the_gain_of_gpt2_changes_nothing_at_its_width() -> None:
    model = new_model(768)
    weight = model.transformer.layers[0].mlp.up_proj.weight.clone()
    scale_input_matrices(model, gain=0.02 * math.sqrt(768), initializer_range=0.02)
    torch.testing.assert_close(model.transformer.layers[0].mlp.up_proj.weight, weight)
