"""Law of the FLOPs of training: they are those that torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from configuration_minigpt import MiniGPTConfig
from minigpt.modeling.flops import train_flops_per_token
from modeling_minigpt import MiniGPTForCausalLM


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_torch_counts(tied: bool) -> None:
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
    config = MiniGPTConfig(vocab_size=128, tie_word_embeddings=tied, attn_implementation="eager", **shape)
    model = MiniGPTForCausalLM(config).eval()
    ids = torch.zeros(1, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    estimate = train_flops_per_token(model.num_parameters(), config, block_size=64)
    # the estimate takes biases and norms for matrices
    assert estimate == pytest.approx(counter.get_total_flops() / 64, rel=0.02)
