"""What more training would bring: the loss of a finished run after some more minutes.

In more minutes the run reads more text at its speed, and its learning rate rises again and decays until their end. The
fitted law says how the loss changes: reading lowers it, and repetition raises it. Runs differ in how much. The law is
corrected by a branch: the same run after a short continuation.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configuration_minigpt import MiniGPTConfig
from minigpt.config.arguments import Arguments
from minigpt.config.parser import parse_arguments
from minigpt.planning.memory import layer_matrix_parameters
from minigpt.planning.scaling_law import LAW, LAW_WITH_DROPOUT, ModelSize, TextNumbers
from minigpt.training.state import TrainingState
from minigpt.utils.errors import UserError
from minigpt.utils.files import read_json
from minigpt.utils.formatting import format_duration
from minigpt.utils.run_files import (
    ARGUMENTS_FILE,
    DATA_FILE,
    METRICS_FILE,
    STATE_FILE,
    find_checkpoints,
    read_metrics,
)

PROGRAM = "minigpt plan"
# Standard deviations: of a loss, relative; of what the law says that reading and repetition change, relative to it:
# see docs/recipes.md
RUN_SPREAD, BRANCH_SPREAD, READING_SPREAD, REPETITION_SPREAD = 0.004, 0.002, 0.45, 0.7


@dataclass(frozen=True)
class Forecast:
    """The validation loss after `more_minutes`, and an interval that holds it in 19 of 20 runs. Nats per token."""

    run_dir: Path
    elapsed_s: float
    more_minutes: float
    loss_now: float
    loss: float
    spread: float  # standard deviation of the logarithm of `loss`
    bits_per_nat: float | None  # bits per byte for a nat per token; None if the bytes of the text are unknown

    @property
    def interval(self) -> tuple[float, float]:
        return self.loss * math.exp(-2 * self.spread), self.loss * math.exp(2 * self.spread)

    def as_dict(self) -> dict[str, Any]:
        """The figures; losses in nats per token."""
        figures: dict[str, Any] = {
            "elapsed_s": self.elapsed_s,
            "more_minutes": self.more_minutes,
            "loss_now": self.loss_now,
        }
        figures |= {"loss": self.loss, "interval": list(self.interval)}
        if self.bits_per_nat is not None:
            figures["bits_per_byte"] = self.loss * self.bits_per_nat
        return figures

    def __str__(self) -> str:
        low, high = self.interval
        per_byte = ""
        if self.bits_per_nat is not None:
            per_byte = f", {self.loss * self.bits_per_nat:.3f} bits per byte"
        return (
            f"validation loss {self.loss_now:.4f} after {format_duration(self.elapsed_s)}; with "
            f"{format_duration(60 * self.more_minutes)} more about {self.loss:.4f} ({low:.4f} to {high:.4f}){per_byte}"
        )

    @property
    def command(self) -> str:
        """The command line that trains on."""
        minutes = math.ceil(100 * (self.elapsed_s / 60 + self.more_minutes)) / 100
        preset = self.run_dir / ARGUMENTS_FILE
        return f"minigpt train {preset} --resume_from_checkpoint latest --train_minutes {minutes:g}"


@dataclass(frozen=True)
class FinishedRun:
    """What the forecast needs of a run: its options and size, what it has read, and the validation loss at its end."""

    args: Arguments
    size: ModelSize
    vocab_size: int
    text_bytes: float  # of training text
    bytes_read: float
    elapsed_s: float
    loss: float  # nats per token
    bits_per_byte: float | None


def forecast(run_dir: Path, more_minutes: float, branch: FinishedRun | None = None) -> Forecast:
    """The forecast for a run that trained a model from scratch and is finished.

    branch: the same run after it was continued for a shorter time (`train_branch`).
    Raises UserError for any other run, and if it has no validation loss or no checkpoint to continue from.
    """
    run = read_finished_run(run_dir)
    reading, repetition = _predicted_changes(run, run.bytes_read * (1 + 60 * more_minutes / run.elapsed_s))
    change, variance = reading + repetition, _covariance((reading, repetition), (reading, repetition))
    if branch is not None:  # the conditional distribution of a Gaussian
        of_branch = _predicted_changes(run, branch.bytes_read)
        covariance = _covariance((reading, repetition), of_branch)
        gain = covariance / (_covariance(of_branch, of_branch) + BRANCH_SPREAD**2)
        change += gain * (math.log(branch.loss / run.loss) - sum(of_branch))
        variance -= gain * covariance
    return Forecast(
        run_dir=run_dir,
        elapsed_s=run.elapsed_s,
        more_minutes=more_minutes,
        loss_now=run.loss,
        loss=run.loss * math.exp(change),
        spread=math.sqrt(2 * RUN_SPREAD**2 + variance),
        bits_per_nat=run.bits_per_byte / run.loss if run.bits_per_byte else None,
    )


def _predicted_changes(run: FinishedRun, bytes_read: float) -> tuple[float, float]:
    """What the law says of the logarithm of the loss: its change by reading, and by repetition, until `bytes_read`."""
    law = LAW_WITH_DROPOUT if run.args.dropout else LAW
    slope = run.args.text_slope or TextNumbers(run.loss).slope_with(run.vocab_size)
    (read_before, read_after), (before, after) = (
        [of.relative_loss(run.size, count, count / run.text_bytes, slope) for count in (run.bytes_read, bytes_read)]
        for of in (replace(law, repetition=0.0), law)
    )
    reading = math.log(1 + (read_after - read_before) / before)
    return reading, math.log(after / before) - reading


def _covariance(changes: tuple[float, float], others: tuple[float, float]) -> float:
    """That of two changes of the loss, each the sum of one by reading and one by repetition, as the law errs."""
    reading, repetition = (change * other for change, other in zip(changes, others, strict=True))
    return READING_SPREAD**2 * reading + REPETITION_SPREAD**2 * repetition


def read_finished_run(run_dir: Path) -> FinishedRun:
    """Raises UserError if `run_dir` holds no finished run of a model from scratch with a validation loss."""
    if not (run_dir / ARGUMENTS_FILE).is_file():
        raise UserError(f"{run_dir} is no folder of a run; more_minutes continues one")
    args = parse_arguments([str(run_dir / ARGUMENTS_FILE)], program=PROGRAM)
    if args.model_name_or_path:
        raise UserError(f"{run_dir}: more_minutes is for models trained from scratch; the law knows no other")
    checkpoints = find_checkpoints(run_dir)
    if not checkpoints:
        raise UserError(f"{run_dir} has no checkpoint to continue from")
    state = TrainingState.load(checkpoints[-1] / STATE_FILE)
    if not state.is_done:
        raise UserError(f"{run_dir} stopped at step {state.step} of {state.max_steps}; let it end first")
    last = [line for line in read_metrics(run_dir / METRICS_FILE) if "val/loss" in line and line["step"] == state.step]
    if not last:
        raise UserError(f"{run_dir} has no validation loss at its end")
    text = read_json(run_dir / DATA_FILE, "the data of a run", ["splits"])["splits"]["train"]
    if not text["text_bytes"]:
        raise UserError(f"{run_dir}: nothing says how many bytes its tokens are, in which the law counts")
    config = MiniGPTConfig.from_pretrained(run_dir)
    return FinishedRun(
        args=args,
        size=ModelSize(
            config.num_hidden_layers * layer_matrix_parameters(config), config.vocab_size * config.hidden_size
        ),
        vocab_size=config.vocab_size,
        text_bytes=text["text_bytes"],
        bytes_read=state.samples_seen * args.block_size * text["text_bytes"] / text["tokens"],
        elapsed_s=state.elapsed_s,
        loss=last[-1]["val/loss"],
        bits_per_byte=last[-1].get("val/bits_per_byte"),
    )
