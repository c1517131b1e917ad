"""Laws of the metrics: bits per byte and perplexity."""

import math

import pytest

from minigpt.evaluation.metrics import validation_metrics


def test_bits_per_byte_of_a_uniform_model_over_bytes_is_eight() -> None:
    metrics = validation_metrics(loss_nats=500 * math.log(256**2), targets=500, text_bytes=1000)  # two bytes per token
    assert metrics["val/bits_per_byte"] == pytest.approx(8)
    assert metrics["val/perplexity"] == pytest.approx(256**2)


def test_bits_per_byte_need_a_known_size_of_the_text() -> None:
    assert "val/bits_per_byte" not in validation_metrics(1.0, 1, None)


def test_perplexity_is_finite_for_every_loss() -> None:
    assert math.isfinite(validation_metrics(1e9, 1, 1)["val/perplexity"])
