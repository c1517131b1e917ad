"""Metrics for Hugging Face's `evaluate`: bits per byte and length-normalized accuracy.

They need no download and work across processes as every `evaluate.Metric` does (`num_process`, `process_id`,
`experiment_id`). The trainer does not use them, so that it runs without `evaluate`.
"""

from typing import Any

import datasets
import evaluate
import numpy as np

from minigpt.evaluation.metrics import bits_per_byte


class BitsPerByte(evaluate.Metric):
    """Bits that a model needs per byte of text, which does not depend on its tokenizer.

    predictions: loss of each text, summed over its tokens, in nats. references: UTF-8 bytes of each text.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="predictions: summed loss of each text in nats; references: its UTF-8 bytes",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[int], **kwargs: Any) -> dict[str, float]:
        if sum(references) <= 0:
            raise ValueError(f"references hold {sum(references)} bytes of text; at least one is needed")
        return {"bits_per_byte": bits_per_byte(float(np.sum(predictions)), sum(references))}


class NormalizedAccuracy(evaluate.Metric):
    """How often the right choice has the highest log-likelihood divided by its length.

    predictions: log-likelihood of each choice in nats. references: index of the right choice. lengths: length of each
    choice, in bytes as in lm-evaluation-harness, in tokens as in build-nanogpt, or 1 for plain accuracy.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="predictions: log-likelihoods of the choices; lengths: their lengths; references: the "
            "index of the right choice",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "lengths": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(
        self, predictions: list[list[float]], lengths: list[list[int]], references: list[int], **kwargs: Any
    ) -> dict[str, float]:
        chosen = [int(np.argmax(np.divide(*pair))) for pair in zip(predictions, lengths, strict=True)]
        return {"acc_norm": float(np.mean(np.equal(chosen, references)))}
