"""Choose the model, vocabulary and batch of a run that has some minutes, so that its validation loss is the lowest.

Every combination of a shape and a vocabulary gets a predicted loss: how many tokens it can read follows from the speed
of this device, and what it learns from them from the law in `scaling_law`. Then the speed of the best combination is
measured, which changes the predictions, until the best one has been measured. Batch and context follow from the number
of tokens.
"""

import math
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import yaml

from minigpt.config.arguments import Arguments
from minigpt.data.datamodule import samples_per_step
from minigpt.planning.memory import largest_that_fits
from minigpt.planning.plan import training_setup
from minigpt.planning.scaling_law import LAW
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

# width → layers; 768 and 12 are GPT-2's
LAYERS = {
    64: 2, 96: 3, 128: 4, 192: 4, 256: 6, 320: 6, 384: 8, 512: 8, 640: 10, 768: 12, 1024: 16, 1280: 20, 1600: 24
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "optimizer": "muon", "muon_learning_rate": 0.02, "muon_momentum": 0.9, "muon_ns_steps": 3, "weight_decay": 0.0,
    "lr_scheduler_type": "linear", "warmup_steps": 10,
}  # fmt: skip
MEASURING_S, MAX_MEASURED = 1.5, 8  # seconds of measuring a combination, and how many are measured
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
    def layer_parameters(self) -> int:
        """Weights of the layers' matrices."""
        return 12 * self.num_hidden_layers * self.hidden_size**2

    @property
    def flops_per_token(self) -> int:
        """FLOPs of forward and backward pass, without attention."""
        return 6 * (self.layer_parameters + self.vocabulary.size * self.hidden_size)

    def __str__(self) -> str:
        return f"{self.hidden_size} wide, {self.num_hidden_layers} layers, {self.vocabulary.size:,} ids"


@dataclass(frozen=True)
class Prediction:
    """What a combination reaches in some minutes: tokens that it reads, and bits per byte of the validation text.

    `epochs` is how often it reads the training text; None if the length of the text is unknown.
    """

    combination: Combination
    minutes: float
    tokens: float
    epochs: float | None
    bits_per_byte: float


@dataclass(frozen=True)
class MeasuredSpeed:
    """Tokens per second of one device, and the micro-batch and accumulation that were measured."""

    tokens_per_s: float
    micro_batch: int
    accumulation: int = 1


@dataclass(frozen=True)
class TimedRun:
    """A run for a given time: its options, and why they were chosen.

    `predictions` are those of all combinations, the best first; the run is the first of them.
    """

    args: Arguments
    minutes: float  # that were given; the run may be shorter
    profile: TextProfile
    predictions: Sequence[Prediction]
    tokens_per_s: float
    steps: int

    def as_dict(self) -> dict[str, Any]:
        """The figures behind the choice, and the prediction."""
        best = self.predictions[0]
        return {
            "train_bytes": self.profile.train_bytes,
            "bytes_per_token": best.combination.vocabulary.bytes_per_token,
            "tokens_per_s": self.tokens_per_s,
            "tokens": best.tokens,
            "epochs": best.epochs,
            "predicted_bits_per_byte": best.bits_per_byte,
            "options": yaml.safe_load(self.args.as_yaml()),
        }

    def lines(self) -> list[str]:
        """What was seen and decided, and why."""
        best, minutes = self.predictions[0], f"{self.args.train_minutes:g} min"
        vocabulary = best.combination.vocabulary
        size = format_bytes(self.profile.train_bytes) if self.profile.train_bytes else "a stream"
        alphabets = ", ".join(f"{name.title()} {share:.0%}" for name, share in self.profile.scripts.items())
        lines = [
            f"text       {size}; letters: {alphabets or 'none'}; {vocabulary.bytes_per_token:.2f} bytes per token "
            f"with {vocabulary.size:,} ids",
            f"device     {self.tokens_per_s:,.0f} tokens/s, measured; about {self.steps:,} steps of "
            f"{best.tokens / self.steps:,.0f} tokens in {minutes}",
            f"model      {best.combination}: the lowest predicted loss of {len(self.predictions)} combinations",
            *(
                f"             {other.bits_per_byte / best.bits_per_byte - 1:+.1%} with {other.combination}"
                for other in self.predictions[1:4]
            ),
        ]
        if best.epochs is not None:
            lines.append(f"epochs     {best.epochs:.1f}: {_repetition(best.epochs)}")
        if best.minutes < self.minutes:
            lines.append(f"time       {minutes} instead of {self.minutes:g}: in more time the model would over-fit")
        return [*lines, f"predicted  {best.bits_per_byte:.2f} bits per byte of validation text"]


def _repetition(epochs: float) -> str:
    """What reading the text so often means."""
    if epochs <= 1:
        return "there is more text than time to read it"
    if epochs <= MANY_EPOCHS:
        return "repeated text is worth almost as much as new text"
    return "the text is small for this time; more text would help more than more minutes"


Speed = Callable[[Arguments, int], MeasuredSpeed | None]  # options, vocabulary → None if the memory is too small


def choose_run(
    args: Arguments,
    given: Set[str],
    processes: int = 1,
    report: Callable[[str], None] = lambda line: None,
    speed: Speed | None = None,
    peak_flops: float | None = None,
) -> TimedRun:
    """Choose those options of a run of `args.train_minutes` that are not `given`.

    processes: of the launch; on GPUs each has one.
    speed, peak_flops: instead of those that are measured on this device.
    Raises UserError if there is no text, or if no combination fits into the memory.
    """
    device = torch.device("cpu" if args.use_cpu or not torch.cuda.is_available() else "cuda")
    precision = args.mixed_precision or ("no" if device.type == "cpu" else "bf16")  # as the launch profiles have it
    speed = speed or _speed_of(device, precision)
    peak_flops = peak_flops or matrix_product_flops(device.type, precision != "no")
    devices = processes if device.type != "cpu" else 1  # processes on a CPU share its cores
    report("looking at the text ...")
    sizes = (args.tokenizer_vocab_size,) if "tokenizer_vocab_size" in given else VOCABULARY_SIZES
    args = _with(args, given, {"validation_split_percentage": validation_percentage(args)})
    profile = profile_text(args, sizes)
    lengths = [
        args.train_minutes / 2 ** (number / 4) for number in range(41)
    ]  # over-fitting may make less time better
    rates: dict[Combination, float] = {}  # measured FLOP/s of one device
    settings: dict[Combination, Arguments] = {}

    def predict(combination: Combination) -> Prediction:
        """The best that the combination can reach within the time."""
        rate = rates.get(combination)
        if rate is None:  # larger models are faster per FLOP: at most as fast as a larger one, and as a matrix product
            larger = [other for other in rates if other.flops_per_token >= combination.flops_per_token]
            rate = rates[min(larger, key=lambda other: other.flops_per_token)] if larger else peak_flops
        tokens_per_minute = 60 * devices * rate / combination.flops_per_token
        predictions = (_predict(combination, profile, tokens_per_minute, minutes) for minutes in lengths)
        return min(predictions, key=lambda prediction: prediction.bits_per_byte)

    combinations = list(_combinations(args, profile))
    while combinations:
        predictions = sorted(map(predict, combinations), key=lambda prediction: prediction.bits_per_byte)
        best = predictions[0]
        if best.combination in rates:
            break
        if len(rates) == MAX_MEASURED:
            combinations = list(rates)
            continue
        report(f"measuring {best.combination} ...")
        options = _options(args, given, best, processes)
        measured = speed(options, best.combination.vocabulary.size)
        if measured is None:
            combinations.remove(best.combination)
            continue
        rates[best.combination] = measured.tokens_per_s * best.combination.flops_per_token
        settings[best.combination] = options.with_values(
            per_device_train_batch_size=measured.micro_batch, gradient_accumulation_steps=measured.accumulation
        )
    else:
        raise UserError(
            f"train_minutes={args.train_minutes:g}: no model fits into the free memory; give a smaller one"
        )
    final = settings[best.combination]
    steps = max(1, round(best.tokens / (samples_per_step(final, processes) * final.block_size)))
    final = _with(final, given, _periods(steps)).with_values(train_minutes=float(f"{best.minutes:.3g}"))
    return TimedRun(final, args.train_minutes, profile, predictions, best.tokens / (60 * best.minutes), steps)


def _predict(combination: Combination, profile: TextProfile, tokens_per_minute: float, minutes: float) -> Prediction:
    vocabulary, tokens = combination.vocabulary, minutes * tokens_per_minute
    epochs = None if profile.train_bytes is None else tokens * vocabulary.bytes_per_token / profile.train_bytes
    loss = LAW.bits_per_byte(vocabulary, combination.layer_parameters, tokens, epochs or 0.0)
    return Prediction(combination, minutes, tokens, epochs, loss)


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
        for vocabulary in profile.vocabularies:
            yield Combination(width, layers, vocabulary)


def _options(args: Arguments, given: Set[str], prediction: Prediction, processes: int) -> Arguments:
    """The options of a run that reads so many tokens."""
    width = prediction.combination.hidden_size
    block_size = args.block_size
    if "block_size" not in given:
        block_size = min(1024, max(128, _power_of_two(128 * (prediction.tokens / CONTEXT_TOKENS) ** 0.5)))
    step_tokens = 2048 * (prediction.tokens / BATCH_TOKENS) ** 0.5
    is_muon = args.optimizer == "muon" or "optimizer" not in given
    trains_tokenizer = args.tokenizer in (None, "bpe") and not args.data
    return _with(
        args,
        given,
        RECIPE
        | {
            **({"tokenizer_vocab_size": prediction.combination.vocabulary.size} if trains_tokenizer else {}),
            "hidden_size": width,
            "num_hidden_layers": prediction.combination.num_hidden_layers,
            "num_attention_heads": _heads(width),
            "block_size": block_size,
            "per_device_train_batch_size": max(1, _power_of_two(step_tokens) // block_size // processes),
            "learning_rate": 0.02 * min(1, 192 / width) if is_muon else 2e-3 * min(1, 256 / width),
        },
    )


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


def _speed_of(device: torch.device, precision: str) -> Speed:
    """Measures training steps on a device."""
    if device.type == "cpu":
        memory_bytes = (1 - CPU_MARGIN) * psutil.virtual_memory().available
    else:
        memory_bytes = (1 - GPU_MARGIN) * torch.cuda.get_device_properties(0).total_memory

    def speed(args: Arguments, vocab_size: int) -> MeasuredSpeed | None:
        config = build_config(args, vocab_size=vocab_size)
        setup = largest_that_fits(training_setup(args, config, precision, device.type), memory_bytes)
        if setup is None:
            return None
        time = measure_step_time(args, config, setup.micro_batch, precision, device, MEASURING_S)
        tokens = setup.tokens * setup.accumulation
        return MeasuredSpeed(tokens / time.step_s(setup.accumulation), setup.micro_batch, setup.accumulation)

    return speed
