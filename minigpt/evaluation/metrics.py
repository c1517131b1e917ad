"""Definitions of the evaluation metrics: perplexity and bits per byte, from losses in nats."""

import math
from dataclasses import dataclass

MAX_EXPONENT = 700.0  # math.exp overflows above 709


def perplexity(loss_nats: float) -> float:
    """exp of a mean loss in nats per token (or per word), limited to exp(700) so that it is finite."""
    return math.exp(min(loss_nats, MAX_EXPONENT))


def bits_per_byte(loss_nats: float, text_bytes: int) -> float:
    """Bits that a model needs per byte of text: the summed loss in nats over the UTF-8 bytes of the text."""
    return loss_nats / math.log(2) / text_bytes


def validation_metrics(loss_nats: float, targets: int, text_bytes: int | None) -> dict[str, float]:
    """`val/...` from the summed loss in nats over all `targets` tokens of a split of `text_bytes` UTF-8 bytes.

    Without bits per byte if the size of the text is unknown.
    """
    mean_loss = loss_nats / targets
    metrics = {"val/loss": mean_loss, "val/perplexity": perplexity(mean_loss)}
    if text_bytes:
        metrics["val/bits_per_byte"] = bits_per_byte(loss_nats, text_bytes)
    return metrics


@dataclass(frozen=True)
class Score:
    """The summed loss of a model over a text, and the size of the text in several units."""

    loss_nats: float
    targets: int
    text_bytes: int
    words: int
    standard_error: float  # of the mean loss, nats per token; windows are the sampling units

    def as_dict(self) -> dict[str, float]:
        """The metrics of `minigpt eval`, under the names that the trainer uses."""
        mean_loss = self.loss_nats / self.targets
        return {
            "loss": mean_loss,
            "standard_error": self.standard_error,
            "perplexity": perplexity(mean_loss),
            "word_perplexity": perplexity(self.loss_nats / max(1, self.words)),
            "bits_per_byte": bits_per_byte(self.loss_nats, max(1, self.text_bytes)),
            "tokens": self.targets,
        }
