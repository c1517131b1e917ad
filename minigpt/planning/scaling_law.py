"""Validation loss as a function of the text, the size of the model and the tokens that it reads, fitted to runs.

    bits per byte = difficulty · (floor + capacity · N^-alpha + reading · D^-beta + repetition · R · (N / U)^½)
    difficulty    = product of ngram_bits^weights; the weights add up to one

N are the weights of the layers' matrices, U the tokens of the training text and R how often it is repeated, epochs
minus one. D are the tokens that are read, in which repeated ones count less; N, U and D are in millions:

    D = U · (1 + fading · (1 - exp(-R / fading)))

The last term is over-fitting. `ngram_bits` is what n-grams of the training text need for a byte of validation text.
Sources: the sum of powers, Hoffmann et al. 2022 (https://arxiv.org/abs/2203.15556); D, Muennighoff et al. 2023
(https://arxiv.org/abs/2305.16264). The difficulty makes one law of all texts and vocabularies.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minigpt.planning.text_profile import ORDERS, Vocabulary

FEWEST_RUNS = 12  # to fit nine constants
PULL = 1e-6  # towards equal weights and a fading of 8, where the runs do not decide them


@dataclass(frozen=True)
class Observation:
    """The result of a run of `layer_parameters` weights that read `tokens`, which are `epochs` times its text."""

    vocabulary: Vocabulary
    layer_parameters: float
    tokens: float
    epochs: float
    bits_per_byte: float


@dataclass(frozen=True)
class ScalingLaw:
    """The constants of the law."""

    floor: float
    capacity: float
    alpha: float
    reading: float
    beta: float
    fading: float
    repetition: float
    weights: tuple[float, ...]  # of n-grams of 1 to ORDERS tokens

    def bits_per_byte(
        self, vocabulary: Vocabulary, layer_parameters: float, tokens: float, epochs: float = 0.0
    ) -> float:
        """The predicted validation loss. `epochs` are 0 if the text is never read to its end."""
        bits, *numbers = _columns([Observation(vocabulary, layer_parameters, tokens, epochs, 1.0)])
        constants = torch.tensor(
            [self.floor, self.capacity, self.alpha, self.reading, self.beta, self.fading, self.repetition]
        )
        return float(_law(constants.double(), torch.tensor(self.weights).double(), bits, *numbers))

    def log_ratio(self, layer_parameters: float, tokens: float, longer: float, text_tokens: float) -> float:
        """The logarithm of the loss after `longer` tokens over that after `tokens`, on any text of `text_tokens`."""
        text = Vocabulary(1, 1.0, (1.0,) * ORDERS)  # its difficulty cancels
        before, after = (
            self.bits_per_byte(text, layer_parameters, read, read / text_tokens) for read in (tokens, longer)
        )
        return math.log(after / before)


def fit(observations: Sequence[Observation]) -> ScalingLaw:
    """The law with the smallest mean square of relative errors. Raises ValueError for fewer than FEWEST_RUNS runs."""
    if len(observations) < FEWEST_RUNS:
        raise ValueError(f"{len(observations)} runs are too few for the law; give at least {FEWEST_RUNS}")
    bits, *numbers = _columns(observations)
    measured = torch.tensor([observation.bits_per_byte for observation in observations]).double()
    logs = torch.tensor([0.4, 0.05, 0.4, 0.15, 0.5, 8.0, 0.01]).double().log().requires_grad_()
    free_weights = torch.full((ORDERS - 1,), 1 / ORDERS).double().requires_grad_()

    def weights() -> torch.Tensor:
        return torch.cat([free_weights, 1 - free_weights.sum(0, keepdim=True)])

    optimizer = torch.optim.LBFGS(
        [logs, free_weights],
        max_iter=1000,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-10,
        tolerance_change=1e-12,
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        errors = (_law(logs.exp(), weights(), bits, *numbers) / measured).log()
        loss = errors.square().mean() + PULL * (
            (logs[5] - math.log(8.0)) ** 2 + (weights() - 1 / ORDERS).square().sum()
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    floor, capacity, alpha, reading, beta, fading, repetition = logs.exp().tolist()
    return ScalingLaw(floor, capacity, alpha, reading, beta, fading, repetition, tuple(weights().tolist()))


def _columns(observations: Sequence[Observation]) -> tuple[torch.Tensor, ...]:
    """Of all runs: the logarithm of `ngram_bits` [runs, ORDERS], N, the tokens read, in millions, and epochs."""
    bits = torch.tensor([list(run.vocabulary.ngram_bits) for run in observations]).double().log()
    layers = torch.tensor([run.layer_parameters / 1e6 for run in observations]).double()
    tokens = torch.tensor([run.tokens / 1e6 for run in observations]).double()
    epochs = torch.tensor([run.epochs for run in observations]).double()
    return bits, layers, tokens, epochs


def _law(
    constants: torch.Tensor,
    weights: torch.Tensor,
    bits: torch.Tensor,
    layers: torch.Tensor,
    tokens: torch.Tensor,
    epochs: torch.Tensor,
) -> torch.Tensor:
    """Predicted bits per byte of all runs: the formula above."""
    floor, capacity, alpha, reading, beta, fading, repetition = constants
    repeated = (epochs - 1).clamp(min=0)
    text = tokens / epochs.clamp(min=1)  # U, or less if the text is not read to its end, when it does not matter
    read = text * (1 + fading * (1 - (-repeated / fading).exp()))
    over_fitting = repetition * repeated * (layers / text).sqrt()
    return (bits @ weights).exp() * (floor + capacity * layers**-alpha + reading * read**-beta + over_fitting)


# Fitted to ... runs
LAW = ScalingLaw(0.4563, 0.0240, 0.429, 0.1648, 0.466, 8.25, 0.0036, (0.782, 0.706, -0.488))
