"""Validation loss as a function of the size of the model and the tokens that it reads, fitted to runs.

    loss = difficulty · (1 + capacity · N^-alpha + slope · reading · (D + start)^-beta + repetition · R · (E / U)²)

Difficulty and slope are measured on a text: how high the loss is, which depends on the vocabulary too, and how much it
falls while more is read. Everything else is the same for all texts. N are the weights of the layers' matrices, E those
of the token embeddings. U are the tokens of the training text, and R is how often it is repeated: epochs minus one. D
are the tokens that are read, in which repeated ones count less. N, E, U, D and start are in millions:

    D = U · (1 + fading · (1 - exp(-R / fading)))

The last term is over-fitting, which depends far more on the embeddings than on the layers. Sources: the sum of powers,
Hoffmann et al. 2022 (https://arxiv.org/abs/2203.15556); D, Muennighoff et al. 2023 (https://arxiv.org/abs/2305.16264).
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch

FEWEST_RUNS = 12
STARTS = (0.07, 0.3, 0.3, 0.07, 0.5, 2.0, 0.003)  # of the fit, in the order of the constants
PULL = 3e-6  # towards these, where the runs do not decide
SLOPE_PULL = 5e-5  # towards a slope of 1


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
    """The loss of a run that read `tokens`, which are `epochs` times its text. The unit of the loss is free."""

    text: str
    vocab_size: int
    size: ModelSize
    tokens: float
    epochs: float
    loss: float


@dataclass(frozen=True)
class ScalingLaw:
    """The constants that all texts share."""

    capacity: float
    alpha: float
    reading: float
    start: float
    beta: float
    fading: float
    repetition: float

    def relative_loss(self, size: ModelSize, tokens: float, epochs: float = 0.0, slope: float = 1.0) -> float:
        """The predicted loss on validation text of difficulty 1.

        `epochs` is how often the text is read, 0 if never to its end.
        """
        numbers = torch.tensor([tokens]).double(), torch.tensor([epochs]).double()
        return float(self.relative_losses(size, *numbers, slope))

    def relative_losses(
        self, size: ModelSize, tokens: torch.Tensor, epochs: torch.Tensor, slope: float = 1.0
    ) -> torch.Tensor:
        """The same for many lengths of a run: float64 [lengths]."""
        layers, embeddings = torch.tensor([size.layers / 1e6, size.embeddings / 1e6]).double()
        constants = torch.tensor(astuple(self)).double()
        return _relative_loss(constants, torch.tensor(slope).double(), layers, embeddings, tokens / 1e6, epochs)


@dataclass(frozen=True)
class Fit:
    """A law, and what it knows of texts: the difficulty of each with each vocabulary, and its slope."""

    law: ScalingLaw
    difficulty: dict[tuple[str, int], float]
    slope: dict[str, float]

    def predict(self, run: Observation) -> float:
        """The loss of a run on one of the texts."""
        loss = self.law.relative_loss(run.size, run.tokens, run.epochs, self.slope[run.text])
        return self.difficulty[run.text, run.vocab_size] * loss


def fit(observations: Sequence[Observation]) -> Fit:
    """The law and the numbers of the texts with the smallest mean square of relative errors.

    Raises ValueError for fewer than FEWEST_RUNS runs.
    """
    if len(observations) < FEWEST_RUNS:
        raise ValueError(f"{len(observations)} runs are too few for the law; give at least {FEWEST_RUNS}")
    constants = torch.tensor(STARTS).double().log().requires_grad_()
    difficulty, slope = _fit(observations, constants)
    return Fit(ScalingLaw(*constants.exp().tolist()), difficulty, slope)


def fit_texts(observations: Sequence[Observation], law: ScalingLaw) -> Fit:
    """The numbers of the texts with the smallest mean square of relative errors, for a law that is known."""
    return Fit(law, *_fit(observations, torch.tensor(astuple(law)).double().log()))


def _fit(
    observations: Sequence[Observation], logs: torch.Tensor
) -> tuple[dict[tuple[str, int], float], dict[str, float]]:
    """Difficulties and slopes. The logarithms of the constants are fitted too, in place, if they need a gradient."""
    texts = sorted({run.text for run in observations})
    levels = sorted({(run.text, run.vocab_size) for run in observations})
    text_of_run = torch.tensor([texts.index(run.text) for run in observations])
    level_of_run = torch.tensor([levels.index((run.text, run.vocab_size)) for run in observations])
    rows = [(run.size.layers / 1e6, run.size.embeddings / 1e6, run.tokens / 1e6, run.epochs) for run in observations]
    columns = list(torch.tensor(rows).double().T)
    measured = torch.tensor([run.loss for run in observations]).double().log()
    starts = logs.detach().clone()
    difficulty = torch.zeros(len(levels)).double().requires_grad_()
    slope = torch.zeros(len(texts)).double().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [number for number in (logs, difficulty, slope) if number.requires_grad],
        max_iter=800, line_search_fn="strong_wolfe", tolerance_grad=1e-11, tolerance_change=1e-14,
    )  # fmt: skip

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        predicted = difficulty[level_of_run] + _relative_loss(logs.exp(), slope[text_of_run].exp(), *columns).log()
        pull = PULL * (logs - starts).square().sum() + SLOPE_PULL * slope.square().sum()
        loss = (predicted - measured).square().mean() + pull
        loss.backward()
        return loss

    optimizer.step(closure)
    return (
        dict(zip(levels, difficulty.exp().tolist(), strict=True)),
        dict(zip(texts, slope.exp().tolist(), strict=True)),
    )


def _relative_loss(
    constants: torch.Tensor,
    slope: torch.Tensor,
    layers: torch.Tensor,
    embeddings: torch.Tensor,
    tokens: torch.Tensor,
    epochs: torch.Tensor,
) -> torch.Tensor:
    """The formula above without the difficulty, for all runs; counts in millions."""
    capacity, alpha, reading, start, beta, fading, repetition = constants
    repeated = (epochs - 1).clamp(min=0)
    text = tokens / epochs.clamp(min=1)  # U; or what is read of it, if it is not read to its end
    read = text * (1 + fading * (1 - (-repeated / fading).exp()))
    over_fitting = repetition * repeated * (embeddings / text) ** 2
    return 1 + capacity * layers**-alpha + slope * reading * (read + start) ** -beta + over_fitting


# Fitted to the runs of docs/law_runs.csv
LAW = ScalingLaw(0.0452, 0.443, 0.380, 0.0754, 0.461, 1.854, 0.0024)
# With this dropout repetition does less harm, at the price of a slower start; from four pairs of runs
DROPOUT, DROPOUT_COST, DROPOUT_RELIEF = 0.1, 1.03, 3.0
LAW_WITH_DROPOUT = replace(LAW, repetition=LAW.repetition / DROPOUT_RELIEF)
