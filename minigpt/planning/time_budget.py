"""Choose the model, vocabulary and batch of a run that has some minutes, so that its validation loss is the lowest.

Every combination of a shape and a vocabulary gets a predicted loss: how many tokens it can read follows from the speed
of this device, and what it learns from them from the law in `scaling_law`. Then the speed of the best combination is
measured, which changes the predictions, until the best one has been measured. Batch and context follow from the number
of tokens.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import yaml

from minigpt.config.arguments import Arguments
from minigpt.data.datamodule import samples_per_step
from minigpt.planning.memory import largest_that_fits
from minigpt.planning.pilot import measure_text
from minigpt.planning.plan import training_setup
from minigpt.planning.recipe import RECIPE, learning_rates
from minigpt.planning.scaling_law import DROPOUT, DROPOUT_COST, LAW, LAW_WITH_DROPOUT, ModelSize, TextNumbers
from minigpt.planning.step_time import measure_step_time
from minigpt.planning.target_hardware import GPU_MARGIN
from minigpt.planning.text_profile import (
    VOCABULARY_SIZES,
    TextProfile,
    Vocabulary,
    profile_text,
    validation_percentage,
)
from minigpt.training.setup import build_config
from minigpt.utils.errors import UserError
from minigpt.utils.formatting import format_bytes
from minigpt.utils.hardware import matrix_product_flops
from minigpt.utils.resources import free_memory

# width → layers; 768 and 12 are GPT-2's
LAYERS = {
    64: 2, 96: 3, 128: 4, 192: 4, 256: 6, 320: 6, 384: 8, 512: 8, 640: 10, 768: 12, 1024: 16, 1280: 20, 1600: 24
}  # fmt: skip
MEASURING_S, MAX_MEASURED = 1.5, 8  # seconds of measuring a combination, and how many are measured at most
CLOSE = 1.005  # the search ends when no combination can be better by more
ALMOST = 1.005  # a shorter run that reads a text again is preferred if its predicted loss is within this
CPU_MARGIN = 0.2  # share of the free memory that is left to others
CONTEXT_TOKENS, BATCH_TOKENS = 3e6, 1.2e6  # a run of so many tokens has a context of 128, a batch of 2,048 tokens
EVALUATIONS = 4
MANY_EPOCHS = 4  # up to so many, text that is read again is almost as good as new


@dataclass(frozen=True)
class Combination:
    """A shape and a vocabulary."""

    hidden_size: int
    num_hidden_layers: int
    vocabulary: Vocabulary

    @property
    def size(self) -> ModelSize:
        return ModelSize.of(self.hidden_size, self.num_hidden_layers, self.vocabulary.size)

    @property
    def flops_per_token(self) -> float:
        """FLOPs of forward and backward pass, without attention."""
        return 6 * (self.size.layers + self.size.embeddings)

    def __str__(self) -> str:
        return f"{self.hidden_size} wide, {self.num_hidden_layers} layers, {self.vocabulary.size:,} ids"


@dataclass(frozen=True)
class Prediction:
    """What a combination reaches in some minutes: tokens that it reads, and its loss on the validation text.

    `epochs` is how often it reads the training text; None if the length of the text is unknown. The minutes may be
    fewer than the given ones, after which the loss would be `after_all_minutes`.
    """

    combination: Combination
    minutes: float
    tokens: float
    epochs: float | None
    dropout: float
    bits_per_byte: float
    after_all_minutes: float


@dataclass(frozen=True)
class MeasuredSpeed:
    """Tokens per second of one device, with the largest micro-batch that fits into its memory."""

    tokens_per_s: float
    micro_batch: int


@dataclass(frozen=True)
class TimedRun:
    """A run for a given time: its options, and why they were chosen.

    `predictions` are those of the combinations that were measured, the best first, which is the run.
    """

    args: Arguments
    minutes: float  # that were given; the run may be shorter
    profile: TextProfile
    predictions: Sequence[Prediction]
    combinations: int  # that were compared
    steps: int
    step_tokens: int

    @property
    def bits_per_byte(self) -> float:
        """The predicted loss on the validation text."""
        return self.predictions[0].bits_per_byte

    @property
    def tokens_per_s(self) -> float:
        """Of all processes, as measured."""
        return self.predictions[0].tokens / (60 * self.predictions[0].minutes)

    def as_dict(self) -> dict[str, Any]:
        """The figures behind the choice, and the prediction."""
        best = self.predictions[0]
        return {
            "train_bytes": self.profile.train_bytes,
            "bytes_per_token": best.combination.vocabulary.bytes_per_token,
            "tokens_per_s": self.tokens_per_s,
            "tokens": best.tokens,
            "epochs": best.epochs,
            "predicted_bits_per_byte": self.bits_per_byte,
            "options": yaml.safe_load(self.args.as_yaml()),
        }

    def lines(self) -> list[str]:
        """What was seen and decided, and why."""
        best, args, minutes = self.predictions[0], self.args, f"{self.args.train_minutes:g} min"
        vocabulary = best.combination.vocabulary
        size = format_bytes(self.profile.train_bytes) if self.profile.train_bytes else "a stream"
        alphabets = ", ".join(f"{name.title()} {share:.0%}" for name, share in self.profile.scripts.items())
        lines = [
            f"text       {size}; letters: {alphabets or 'none'}; {vocabulary.bytes_per_token:.2f} bytes per token "
            f"with {vocabulary.size:,} ids",
            f"device     {self.tokens_per_s:,.0f} tokens/s, measured; about {self.steps:,} steps of "
            f"{self.step_tokens:,} tokens in {minutes}",
            f"model      {best.combination}: the lowest predicted loss of {self.combinations} combinations",
            *(
                f"             {other.bits_per_byte / best.bits_per_byte - 1:+.1%} with {other.combination}"
                for other in self.predictions[1:4]
            ),
        ]
        if best.epochs is not None:
            lines.append(f"epochs     {best.epochs:.1f}, dropout {args.dropout:g}: {_repetition(best.epochs)}")
        if best.minutes < self.minutes:
            after_all = f"{best.after_all_minutes:.2f} bits per byte after {self.minutes:g}"
            reason = (
                f"in more time the model would over-fit, to {after_all}"
                if best.after_all_minutes > best.bits_per_byte
                else f"more time would bring less than {ALMOST - 1:.1%}, {after_all}"
            )
            lines.append(f"time       {minutes} instead of {self.minutes:g}: {reason}")
        return [*lines, f"predicted  {self.bits_per_byte:.2f} bits per byte of validation text"]


def _repetition(epochs: float) -> str:
    """What reading the text so often means."""
    if epochs <= 1:
        return "there is more text than time to read it"
    if epochs <= MANY_EPOCHS:
        return "repeated text is worth almost as much as new text"
    return "the text is small for this time; more text would help more than more minutes"


class Device(Protocol):
    """What is measured of a device."""

    processes: int  # that train at the same time, each as fast as one alone

    def measure_text(self, args: Arguments, profile: TextProfile) -> TextNumbers:
        """The numbers of the text in the fitted law."""

    def peak_flops(self) -> float:
        """FLOP/s that no model exceeds."""

    def speed(self, args: Arguments, vocab_size: int) -> MeasuredSpeed | None:
        """The speed of training with these options; None if the memory is too small."""


def choose_run(
    args: Arguments,
    given: Set[str],
    processes: int = 1,
    report: Callable[[str], None] = lambda line: None,
    device: Device | None = None,
) -> TimedRun:
    """Choose those options of a run of `args.train_minutes` in some `processes` that are not `given`.

    device: None is that of this machine.
    Raises UserError if there is no text, or if no combination fits into the memory.
    """
    device = device or _ThisDevice(args, processes)
    args = _with(args, given, {"validation_split_percentage": validation_percentage(args)})
    report("looking at the text ...")
    profile = profile_text(args, (args.tokenizer_vocab_size,) if "tokenizer_vocab_size" in given else VOCABULARY_SIZES)
    combinations = list(_combinations(args, profile))
    report("training tiny models on a sample of it ...")
    text = device.measure_text(args, profile)
    rates: dict[Combination, float] = {}  # measured FLOP/s of one process
    micro_batches: dict[Combination, int] = {}  # the largest that fit
    peak_flops = device.peak_flops()

    def predict(combination: Combination) -> Prediction:
        rate = device.processes * _rate(combination, rates, peak_flops)
        return _predict(combination, text, args.train_minutes, rate, profile.train_bytes)

    while combinations:
        predictions = sorted(map(predict, combinations), key=lambda prediction: prediction.bits_per_byte)
        hope = predictions[0]
        measured_ones = [prediction for prediction in predictions if prediction.combination in rates]
        if measured_ones and (
            measured_ones[0].bits_per_byte <= CLOSE * hope.bits_per_byte or len(rates) == MAX_MEASURED
        ):
            break
        report(f"measuring {hope.combination} ...")
        options = _options(args, given, hope, processes)
        measured = device.speed(options, hope.combination.vocabulary.size)
        is_kept = measured is not None and (
            "per_device_train_batch_size" not in given or measured.micro_batch == options.per_device_train_batch_size
        )
        if measured is None or not is_kept:  # it does not fit, or not with the batch that was given
            combinations.remove(hope.combination)
            continue
        rates[hope.combination] = measured.tokens_per_s * hope.combination.flops_per_token
        micro_batches[hope.combination] = measured.micro_batch
    else:
        raise UserError(
            f"train_minutes={args.train_minutes:g}: no model fits into the free memory; give a smaller one"
        )
    best = measured_ones[0]
    final = _options(args, given, best, processes)  # the batch follows from the tokens at the measured speed
    samples = final.per_device_train_batch_size * final.gradient_accumulation_steps
    limit = min(final.per_device_train_batch_size, micro_batches[best.combination])
    micro_batch = max(size for size in range(1, limit + 1) if samples % size == 0)
    final = final.with_values(
        per_device_train_batch_size=micro_batch, gradient_accumulation_steps=samples // micro_batch
    )
    step_tokens = samples_per_step(final, processes) * final.block_size
    steps = max(1, round(best.tokens / step_tokens))
    slope = text.slope_with(best.combination.vocabulary.size)
    final = _with(final, given, _periods(steps) | {"text_slope": float(f"{slope:.3g}")})
    final = final.with_values(train_minutes=float(f"{best.minutes:.3g}"))
    return TimedRun(final, args.train_minutes, profile, measured_ones, len(combinations), steps, step_tokens)


def _rate(combination: Combination, rates: Mapping[Combination, float], peak_flops: float) -> float:
    """The measured FLOP/s of a combination, or the most it may have.

    Larger models are faster per FLOP: a model is at most as fast as a larger one, and as a matrix product.
    """
    if combination in rates:
        return rates[combination]
    larger = [other for other in rates if other.flops_per_token >= combination.flops_per_token]
    return rates[min(larger, key=lambda other: other.flops_per_token)] if larger else peak_flops


def _predict(
    combination: Combination, text: TextNumbers, minutes: float, rate: float, train_bytes: float | None
) -> Prediction:
    """The best that a combination can reach within the time, at `rate` FLOP/s.

    Where the text is repeated, dropout may help, and so may less time: the shortest that is predicted to be almost as
    good, since a law cannot say to the percent where over-fitting begins.
    """
    vocabulary = combination.vocabulary
    lengths = minutes / 2 ** (torch.arange(41, dtype=torch.float64) / 4)
    tokens = 60 * lengths * rate / combination.flops_per_token
    text_bytes = tokens * vocabulary.bytes_per_token
    epochs = text_bytes / (train_bytes or math.inf)
    run = combination.size, text_bytes, epochs, text.slope_with(vocabulary.size)
    losses = {
        0.0: LAW.relative_losses(*run),
        DROPOUT: DROPOUT_COST * LAW_WITH_DROPOUT.relative_losses(*run),
    }
    dropout = min(losses, key=lambda dropout: float(losses[dropout].min()))
    lowest = float(losses[dropout].min())
    best = max(
        index
        for index, loss in enumerate(losses[dropout].tolist())
        if loss == lowest or (loss <= ALMOST * lowest and epochs[index] > 1)
    )
    return Prediction(
        combination=combination,
        minutes=float(lengths[best]),
        tokens=float(tokens[best]),
        epochs=float(epochs[best]) if train_bytes is not None else None,
        dropout=dropout,
        bits_per_byte=text.difficulty * float(losses[dropout][best]),
        after_all_minutes=text.difficulty * float(losses[dropout][0]),
    )


def _combinations(args: Arguments, profile: TextProfile) -> Iterator[Combination]:
    """All shapes and vocabularies that the given options leave. Raises UserError if there are none."""
    heads = args.num_attention_heads or 1
    widths = [width for width in [args.hidden_size] if width is not None] or list(LAYERS)
    if not any(width % heads == 0 for width in widths):
        raise UserError(f"num_attention_heads={heads} divides none of the widths {', '.join(map(str, widths))}")
    for width in widths:
        if width % heads:
            continue
        layers = args.num_hidden_layers or LAYERS[min(LAYERS, key=lambda known: abs(known - width))]
        for sample in profile.samples:
            yield Combination(width, layers, sample.vocabulary)


def _options(args: Arguments, given: Set[str], prediction: Prediction, processes: int) -> Arguments:
    """The options of a run that reads so many tokens."""
    width = prediction.combination.hidden_size
    block_size = args.block_size
    if "block_size" not in given:
        block_size = min(1024, max(128, _power_of_two(128 * (prediction.tokens / CONTEXT_TOKENS) ** 0.5)))
    step_tokens = 2048 * (prediction.tokens / BATCH_TOKENS) ** 0.5
    parallel = processes * args.gradient_accumulation_steps
    is_muon = args.optimizer == "muon" or "optimizer" not in given
    return _with(
        args,
        given,
        RECIPE
        | {
            **({"tokenizer_vocab_size": prediction.combination.vocabulary.size} if _trains_tokenizer(args) else {}),
            "hidden_size": width,
            "num_hidden_layers": prediction.combination.num_hidden_layers,
            "num_attention_heads": _heads(width),
            "block_size": block_size,
            "dropout": prediction.dropout,
            "per_device_train_batch_size": max(1, _power_of_two(step_tokens) // block_size // parallel),
            **learning_rates(width, is_muon),
        },
    )


def _trains_tokenizer(args: Arguments) -> bool:
    return args.tokenizer in (None, "bpe") and not args.data


def _periods(steps: int) -> dict[str, Any]:
    """The options that follow from the number of steps."""
    return {
        "warmup_steps": min(RECIPE["warmup_steps"], steps // 4),
        "logging_steps": max(1, min(10, steps // 20)),
        "eval_steps": max(1, steps // EVALUATIONS),
        "save_steps": max(1, steps // EVALUATIONS),
    }


def _with(args: Arguments, given: Set[str], options: dict[str, Any]) -> Arguments:
    """`args` with those `options` that are not `given`."""
    return args.with_values(**{name: value for name, value in options.items() if name not in given})


def _heads(width: int) -> int:
    """Heads of 32, or 64 in wide models, or as near to it as divides the width."""
    wanted = width / (32 if width < 384 else 64)
    return min((heads for heads in range(1, width + 1) if width % heads == 0), key=lambda heads: abs(heads - wanted))


def _power_of_two(number: float) -> int:
    """The power of two that is nearest by ratio, at least 1."""
    return 2 ** max(0, round(math.log2(number)))


class _ThisDevice:
    """The CPU or the GPU of this machine. Processes on a CPU share its cores, and are not faster than one."""

    def __init__(self, args: Arguments, processes: int) -> None:
        self.device = torch.device("cpu" if args.use_cpu or not torch.cuda.is_available() else "cuda")
        self.precision = args.mixed_precision or (
            "no" if self.device.type == "cpu" else "bf16"
        )  # the profiles' defaults
        self.processes = 1
        self.memory_bytes = (1 - CPU_MARGIN) * free_memory()
        if self.device.type != "cpu":
            self.processes = processes
            self.memory_bytes = (1 - GPU_MARGIN) * torch.cuda.get_device_properties(0).total_memory

    def measure_text(self, args: Arguments, profile: TextProfile) -> TextNumbers:
        return measure_text(args, self.device, profile.samples)

    def peak_flops(self) -> float:
        return matrix_product_flops(self.device.type, self.precision != "no", rounds=3)

    def speed(self, args: Arguments, vocab_size: int) -> MeasuredSpeed | None:
        config = build_config(args, vocab_size=vocab_size)
        whole = training_setup(args, config, self.precision, self.device.type)
        setup = largest_that_fits(whole, self.memory_bytes)
        if setup is None:
            return None
        time = measure_step_time(args, config, setup.micro_batch, self.precision, self.device, MEASURING_S)
        tokens = setup.tokens * setup.accumulation
        return MeasuredSpeed(tokens / time.step_s(setup.accumulation), setup.micro_batch)
