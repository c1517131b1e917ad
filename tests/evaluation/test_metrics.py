"""Laws of the metrics: bits per byte, perplexity, FLOPs and peak memory."""

import math

import pytest
import torch

from configuration_minigpt import MiniGPTConfig
from minigpt.evaluation.metrics import validation_metrics
from minigpt.modeling.flops import train_flops_per_token
from minigpt.utils.hardware import peak_flops, peak_memory_gib
from modeling_minigpt import MiniGPTForCausalLM


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_torch_counts(tied: bool) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
    config = MiniGPTConfig(vocab_size=128, tie_word_embeddings=tied, attn_implementation="eager", **shape)
    model = MiniGPTForCausalLM(config).eval()
    ids = torch.zeros(1, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    ours = train_flops_per_token(model.num_parameters(), config, block_size=64)
    assert ours == pytest.approx(counter.get_total_flops() / 64, rel=0.02)  # biases and norms are counted as matrices


def test_bits_per_byte_of_a_uniform_model_over_bytes_is_eight() -> None:
    metrics = validation_metrics(loss_nats=500 * math.log(256**2), targets=500, text_bytes=1000)  # two bytes per token
    assert metrics["val/bits_per_byte"] == pytest.approx(8)
    assert metrics["val/perplexity"] == pytest.approx(256**2)
    assert "val/bits_per_byte" not in validation_metrics(1.0, 1, None)
    assert math.isfinite(validation_metrics(1e9, 1, 1)["val/perplexity"])


def test_an_unknown_device_has_no_peak_and_memory_is_in_gib() -> None:
    assert peak_flops(torch.device("cpu")) is None
    held = torch.zeros(2**28)  # one GiB
    assert 1 < peak_memory_gib(torch.device("cpu")) < 20
    assert held.sum() == 0
