"""Validation loss as a function of model size and of the text that it reads, fitted to finished runs.

    bits per byte = floor + capacity · parameters^-alpha + reading · bytes^-beta

The exponents alpha and beta are shared by all texts; floor, capacity and reading belong to one text. `parameters` are
those of the layers, `bytes` the text read in training, repetitions included.
Source of the form: Hoffmann et al. 2022 (https://arxiv.org/abs/2203.15556); here in bits per byte instead of nats per
token, so that vocabularies of different sizes can be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EXPONENTS = np.arange(0.1, 1.21, 0.05)  # tried for alpha and beta


@dataclass(frozen=True)
class Observation:
    """The result of one run."""

    text: str
    parameters: float
    text_bytes: float
    bits_per_byte: float


@dataclass(frozen=True)
class TextConstants:
    """What belongs to one text."""

    floor: float
    capacity: float
    reading: float


@dataclass(frozen=True)
class ScalingLaw:
    """The shared exponents, and the constants of each text."""

    alpha: float
    beta: float
    texts: dict[str, TextConstants]

    def bits_per_byte(self, text: str, parameters: float, text_bytes: float) -> float:
        """The predicted validation loss of a model with so many parameters that has read so many bytes."""
        constants = self.texts[text]
        capacity = constants.capacity * (parameters / 1e6) ** -self.alpha
        return float(constants.floor + capacity + constants.reading * (text_bytes / 1e6) ** -self.beta)


def fit(observations: Sequence[Observation]) -> ScalingLaw:
    """The law with the smallest sum of squared relative errors.

    For each pair of exponents the constants follow from linear least squares, with none below zero. Raises ValueError
    for a text with fewer than four runs.
    """
    texts = sorted({observation.text for observation in observations})
    best: tuple[float, ScalingLaw] | None = None
    for alpha in EXPONENTS:
        for beta in EXPONENTS:
            total, constants = 0.0, {}
            for text in texts:
                runs = [observation for observation in observations if observation.text == text]
                if len(runs) < 4:
                    raise ValueError(f"{text} has {len(runs)} runs; three constants need at least 4")
                constants[text], error = _constants(runs, alpha, beta)
                total += error
            if best is None or total < best[0]:
                best = total, ScalingLaw(float(alpha), float(beta), constants)
    assert best is not None
    return best[1]


def _constants(runs: Sequence[Observation], alpha: float, beta: float) -> tuple[TextConstants, float]:
    """The constants of one text for given exponents, and the sum of squared relative errors."""
    measured = np.array([run.bits_per_byte for run in runs])
    columns = np.array([[1.0, (run.parameters / 1e6) ** -alpha, (run.text_bytes / 1e6) ** -beta] for run in runs])
    weighted = columns / measured[:, None]
    kept = [0, 1, 2]
    while True:  # drop columns whose constant would be below zero
        solution = np.linalg.lstsq(weighted[:, kept], np.ones(len(runs)), rcond=None)[0]
        if (solution >= 0).all():
            break
        kept.pop(int(solution.argmin()))
    constants = np.zeros(3)
    constants[kept] = solution
    error = float(((weighted @ constants - 1) ** 2).sum())
    return TextConstants(*map(float, constants)), error
