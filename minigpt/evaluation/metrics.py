"""Definitions of the evaluation metrics: loss, perplexity, bits per byte."""

import math
from dataclasses import dataclass


def validation_metrics(loss_nats: float, targets: int, text_bytes: int | None) -> dict[str, float]:
    """`val/…` from the summed loss (nats) over all `targets` tokens of a split of `text_bytes` UTF-8 bytes."""
    mean = loss_nats / targets
    metrics = {"val/loss": mean, "val/perplexity": math.exp(min(mean, 700.0))}
    if text_bytes:
        metrics["val/bits_per_byte"] = loss_nats / math.log(2) / text_bytes
    return metrics


@dataclass(frozen=True)
class Score:
    """What a model makes of a text: the sum of its loss, and what it is spread over."""

    loss_nats: float
    targets: int
    text_bytes: int
    words: int
    standard_error: float  # of the mean loss, nats a token; windows are the sampling units

    def as_dict(self) -> dict[str, float]:
        """The metrics under the names that the trainer uses."""
        mean = self.loss_nats / self.targets
        return {
            "loss": mean,
            "standard_error": self.standard_error,
            "perplexity": math.exp(min(mean, 700.0)),
            "word_perplexity": math.exp(min(self.loss_nats / max(1, self.words), 700.0)),
            "bits_per_byte": self.loss_nats / math.log(2) / max(1, self.text_bytes),
            "tokens": self.targets,
        }
