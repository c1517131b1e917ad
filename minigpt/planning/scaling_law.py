"""Validation loss as a function of the size of the model and the text that it reads, fitted to runs.

    loss = difficulty · (1 + capacity · N^-alpha + embedding · (E + offset)^-gamma
                           + slope · reading · (D + start)^-beta
                           + repetition · R · ((E / U)² + layer_part · N / U))

Difficulty and slope are measured on a text: how high the loss is in the end, and how much it falls while more is read.
The slope falls with a power of the number of ids, which is also measured: a larger vocabulary brings its gain early.
Everything else is the same for all texts. N are the weights of the layers' matrices, and E those of the token
embeddings, in millions. U are the bytes of the training text, and R is how often it is repeated: epochs minus one. D
are the bytes that are read, in which repeated ones count less. U, D and start are in megabytes:

    D = U · (1 + fading · (1 - exp(-R / fading)))

The terms of N and E say what a model is too small for, however much it reads: few embeddings limit it too. The last
one is over-fitting, which depends more on the embeddings than on the layers. Sources: the sum of powers, Hoffmann et
al. 2022 (https://arxiv.org/abs/2203.15556); D, Muennighoff et al. 2023 (https://arxiv.org/abs/2305.16264).
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch

FEWEST_RUNS = 12
STARTS = (0.06, 0.3, 0.03, 0.5, 0.04, 0.6, 0.3, 0.5, 2.0, 0.04, 0.1)  # of the fit, in the order of the constants
PULL = 1e-5  # towards these, where the runs do not decide
SLOPE_PULL, GAIN_PULL = 5e-5, 1e-4  # towards a slope of 1 and the gain of a typical text
VOCABULARY = 2048  # a slope is that with so many ids
TYPICAL_GAIN = 0.13


@dataclass(frozen=True)
class ModelSize:
    """Weights of the layers' matrices, and of the token embeddings."""

    layers: float
    embeddings: float

    @classmethod
    def of(cls, hidden_size: int, num_hidden_layers: int, vocab_size: int) -> "ModelSize":
        """That of a model with GPT-2's proportions."""
        return cls(12 * num_hidden_layers * hidden_size**2, vocab_size * hidden_size)


@dataclass(frozen=True)
class Observation:
    """The loss of a run that read `text_bytes`, which are `epochs` times its text.

    The unit of the loss is free, but it must be per byte, such as bits per byte, where vocabularies are compared.
    """

    text: str
    vocab_size: int
    size: ModelSize
    text_bytes: float
    epochs: float
    loss: float


@dataclass(frozen=True)
class TextNumbers:
    """What the law must know of a text; by default, that it is a typical one.

    `difficulty` is in the unit of the losses. `slope` is that with 2,048 ids, and falls with the power
    `vocabulary_gain` of their number.
    """

    difficulty: float
    slope: float = 1.0
    vocabulary_gain: float = TYPICAL_GAIN

    def slope_with(self, vocab_size: int) -> float:
        """The slope with so many ids."""
        return self.slope * (vocab_size / VOCABULARY) ** -self.vocabulary_gain


@dataclass(frozen=True)
class ScalingLaw:
    """The constants that all texts share."""

    capacity: float
    alpha: float
    embedding: float
    gamma: float
    offset: float
    reading: float
    start: float
    beta: float
    fading: float
    repetition: float
    layer_part: float

    def relative_loss(self, size: ModelSize, text_bytes: float, epochs: float = 0.0, slope: float = 1.0) -> float:
        """The predicted loss on validation text of difficulty 1.

        `epochs` is how often the text is read, 0 if never to its end.
        """
        numbers = torch.tensor([text_bytes]).double(), torch.tensor([epochs]).double()
        return float(self.relative_losses(size, *numbers, slope))

    def relative_losses(
        self, size: ModelSize, text_bytes: torch.Tensor, epochs: torch.Tensor, slope: float = 1.0
    ) -> torch.Tensor:
        """The same for many lengths of a run: float64 [lengths]."""
        layers, embeddings = torch.tensor([size.layers / 1e6, size.embeddings / 1e6]).double()
        constants = torch.tensor(astuple(self)).double()
        return _relative_loss(constants, torch.tensor(slope).double(), layers, embeddings, text_bytes / 1e6, epochs)


@dataclass(frozen=True)
class Fit:
    """A law, and what it must know of texts."""

    law: ScalingLaw
    texts: dict[str, TextNumbers]

    def predict(self, run: Observation) -> float:
        """The loss of a run on one of the texts."""
        text = self.texts[run.text]
        slope = text.slope_with(run.vocab_size)
        return text.difficulty * self.law.relative_loss(run.size, run.text_bytes, run.epochs, slope)


def fit(observations: Sequence[Observation]) -> Fit:
    """The law and the numbers of the texts with the smallest mean square of relative errors.

    Raises ValueError for fewer than FEWEST_RUNS runs.
    """
    if len(observations) < FEWEST_RUNS:
        raise ValueError(f"{len(observations)} runs are too few for the law; give at least {FEWEST_RUNS}")
    constants = torch.tensor(STARTS).double().log().requires_grad_()
    texts = _fit(observations, constants)
    return Fit(ScalingLaw(*constants.exp().tolist()), texts)


def fit_texts(observations: Sequence[Observation], law: ScalingLaw) -> Fit:
    """The numbers of the texts with the smallest mean square of relative errors, for a law that is known."""
    return Fit(law, _fit(observations, torch.tensor(astuple(law)).double().log()))


def _fit(observations: Sequence[Observation], logs: torch.Tensor) -> dict[str, TextNumbers]:
    """The numbers of the texts. The logarithms of the constants are fitted too, in place, if they need a gradient."""
    texts = sorted({run.text for run in observations})
    text_of_run = torch.tensor([texts.index(run.text) for run in observations])
    rows = [
        (run.size.layers / 1e6, run.size.embeddings / 1e6, run.text_bytes / 1e6, run.epochs) for run in observations
    ]
    columns = list(torch.tensor(rows).double().unbind(1))
    ids = torch.tensor([run.vocab_size / VOCABULARY for run in observations]).double().log()
    measured = torch.tensor([run.loss for run in observations]).double().log()
    starts = logs.detach().clone()
    difficulty, slope = torch.zeros(2, len(texts)).double()  # logarithms
    gain = torch.full_like(slope, TYPICAL_GAIN)
    numbers = [number.requires_grad_() for number in (difficulty, slope, gain)]
    optimizer = torch.optim.LBFGS(
        [*numbers, logs] if logs.requires_grad else numbers,
        max_iter=800, line_search_fn="strong_wolfe", tolerance_grad=1e-11, tolerance_change=1e-14,
    )  # fmt: skip

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        slopes = (slope[text_of_run] - gain[text_of_run] * ids).exp()
        predicted = difficulty[text_of_run] + _relative_loss(logs.exp(), slopes, *columns).log()
        pulls = PULL * (logs - starts).square().sum() + SLOPE_PULL * slope.square().sum()
        pulls = pulls + GAIN_PULL * (gain - TYPICAL_GAIN).square().sum()
        loss = (predicted - measured).square().mean() + pulls
        loss.backward()
        return loss

    optimizer.step(closure)
    found = zip(difficulty.exp().tolist(), slope.exp().tolist(), gain.tolist(), strict=True)
    return {text: TextNumbers(*values) for text, values in zip(texts, found, strict=True)}


def _relative_loss(
    constants: torch.Tensor,
    slope: torch.Tensor,
    layers: torch.Tensor,
    embeddings: torch.Tensor,
    text_bytes: torch.Tensor,
    epochs: torch.Tensor,
) -> torch.Tensor:
    """The formula above without the difficulty, for all runs; sizes in millions."""
    capacity, alpha, embedding, gamma, offset, reading, start, beta, fading, repetition, layer_part = constants
    repeated = (epochs - 1).clamp(min=0)
    text = text_bytes / epochs.clamp(min=1)  # U; or what is read of it, if it is not read to its end
    read = text * (1 + fading * (1 - (-repeated / fading).exp()))
    over_fitting = repetition * repeated * ((embeddings / text) ** 2 + layer_part * layers / text)
    size = capacity * layers**-alpha + embedding * (embeddings + offset) ** -gamma
    return 1 + size + slope * reading * (read + start) ** -beta + over_fitting


# Fitted to the runs of docs/law_runs.csv
LAW = ScalingLaw(0.0557, 0.369, 0.0311, 0.6, 0.0538, 0.66, 0.358, 0.58, 2.23, 0.0375, 0.142)
# With this dropout repetition does less harm, at the price of a slower start; from four pairs of runs
DROPOUT, DROPOUT_COST, DROPOUT_RELIEF = 0.1, 1.03, 3.0
LAW_WITH_DROPOUT = replace(LAW, repetition=LAW.repetition / DROPOUT_RELIEF)
