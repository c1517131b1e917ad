"""Validation loss as a function of the size of the model, the tokens that it reads and the vocabulary, fitted to runs.

    bits per byte = difficulty · unigram^vocabulary
                    · (1 + capacity · N^-alpha + reading · D^-beta + repetition · R · (W / U)^1.5)

The difficulty belongs to a text; everything else is the same for all. `unigram` are the bits per byte of token
frequencies alone, which fall as the vocabulary grows. N are the weights of the layers' matrices, W these and those of
the token embeddings. U are the tokens of the training text and R is how often it is repeated, epochs minus one. D are
the tokens that are read, in which repeated ones count less; N, W, U and D are in millions:

    D = U · (1 + fading · (1 - exp(-R / fading)))

The last term is over-fitting. Sources: the sum of powers, Hoffmann et al. 2022 (https://arxiv.org/abs/2203.15556); D,
Muennighoff et al. 2023 (https://arxiv.org/abs/2305.16264).
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch

FEWEST_RUNS = 12
STARTS = (0.5, 0.08, 0.4, 0.5, 0.4, 4.0, 0.007)  # of the fit, in the order of the constants
PULL = 1e-5  # towards these, where the runs do not decide


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
    """The result of a run that read `tokens`, which are `epochs` times its text."""

    text: str
    unigram_bits: float
    size: ModelSize
    tokens: float
    epochs: float
    bits_per_byte: float


@dataclass(frozen=True)
class ScalingLaw:
    """The constants that all texts share."""

    vocabulary: float
    capacity: float
    alpha: float
    reading: float
    beta: float
    fading: float
    repetition: float

    def relative_loss(self, unigram_bits: float, size: ModelSize, tokens: float, epochs: float = 0.0) -> float:
        """The predicted bits per byte of validation text for a text of difficulty 1.

        `epochs` is how often the text is read, 0 if never to its end.
        """
        numbers = torch.tensor([tokens]).double(), torch.tensor([epochs]).double()
        return float(self.relative_losses(unigram_bits, size, *numbers))

    def relative_losses(
        self, unigram_bits: float, size: ModelSize, tokens: torch.Tensor, epochs: torch.Tensor
    ) -> torch.Tensor:
        """The same for many lengths of a run: float64 [lengths]."""
        unigram, layers, embeddings = torch.tensor([unigram_bits, size.layers / 1e6, size.embeddings / 1e6]).double()
        constants = torch.tensor(astuple(self)).double()
        return _relative_loss(constants, unigram, layers, embeddings, tokens / 1e6, epochs)


def fit(observations: Sequence[Observation]) -> tuple[ScalingLaw, dict[str, float]]:
    """The law with the smallest mean square of relative errors, and the difficulty of each text.

    Raises ValueError for fewer than FEWEST_RUNS runs.
    """
    if len(observations) < FEWEST_RUNS:
        raise ValueError(f"{len(observations)} runs are too few for the law; give at least {FEWEST_RUNS}")
    texts = sorted({run.text for run in observations})
    text_of_run = torch.tensor([texts.index(run.text) for run in observations])
    columns = _columns(observations)
    measured = torch.tensor([run.bits_per_byte for run in observations]).double().log()
    starts = torch.tensor(STARTS).double().log()
    logs = starts.clone().requires_grad_()
    difficulty = torch.zeros(len(texts)).double().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logs, difficulty], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-11, tolerance_change=1e-14
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        errors = difficulty[text_of_run] + _relative_loss(logs.exp(), *columns).log() - measured
        loss = errors.square().mean() + PULL * (logs - starts).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return ScalingLaw(*logs.exp().tolist()), dict(zip(texts, difficulty.exp().tolist(), strict=True))


def log_ratio(size: ModelSize, tokens: float, longer: float, text_tokens: float) -> float:
    """The logarithm of the loss after `longer` tokens over that after `tokens`; the difficulty of the text cancels."""
    before, after = (LAW.relative_loss(1.0, size, read, read / text_tokens) for read in (tokens, longer))
    return math.log(after / before)


def _columns(observations: Sequence[Observation]) -> list[torch.Tensor]:
    """Of all runs: unigram bits; the weights of layers and embeddings, and the tokens read, in millions; epochs."""
    rows = [
        (run.unigram_bits, run.size.layers / 1e6, run.size.embeddings / 1e6, run.tokens / 1e6, run.epochs)
        for run in observations
    ]
    return list(torch.tensor(rows).double().T)


def _relative_loss(
    constants: torch.Tensor,
    unigram: torch.Tensor,
    layers: torch.Tensor,
    embeddings: torch.Tensor,
    tokens: torch.Tensor,
    epochs: torch.Tensor,
) -> torch.Tensor:
    """The formula above without the difficulty, for all runs."""
    vocabulary, capacity, alpha, reading, beta, fading, repetition = constants
    repeated = (epochs - 1).clamp(min=0)
    text = tokens / epochs.clamp(min=1)  # U; or what is read of it, if it is not read to its end
    read = text * (1 + fading * (1 - (-repeated / fading).exp()))
    over_fitting = repetition * repeated * ((layers + embeddings) / text) ** 1.5
    return unigram**vocabulary * (1 + capacity * layers**-alpha + reading * read**-beta + over_fitting)


# Fitted to 27 runs on three texts, and to what a first fit says of its 43 runs on nine others: see docs/recipes.md
LAW = ScalingLaw(0.5521, 0.0886, 0.36, 0.3658, 0.4909, 1.831, 0.0023)
# With this dropout repetition does less harm, at the price of a slower start; from four pairs of runs
DROPOUT, DROPOUT_COST, DROPOUT_RELIEF = 0.1, 1.03, 3.0
LAW_WITH_DROPOUT = replace(LAW, repetition=LAW.repetition / DROPOUT_RELIEF)
