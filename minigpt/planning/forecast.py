"""What more training would bring: the loss of a finished run after some more minutes, by the fitted law.

The law gives the ratio of the two losses, in which the difficulty of the text cancels; its slope is measured. In more
minutes the run reads more text at its speed; its learning rate rises again and decays until their end.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configuration_minigpt import MiniGPTConfig
from minigpt.config.arguments import Arguments
from minigpt.config.parser import parse_arguments
from minigpt.planning.memory import layer_matrix_parameters
from minigpt.planning.pilot import measure_text
from minigpt.planning.scaling_law import LAW, ModelSize, TextNumbers
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
# Standard deviations: of a loss, relative; of the change that the law predicts, relative to it, with the slope of a
# typical text and with one that was measured: see docs/recipes.md
RUN_SPREAD, LAW_SPREAD, SLOPE_SPREAD = 0.004, 0.45, 0.4


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
        minutes = "minute" if self.more_minutes == 1 else "minutes"
        return (
            f"validation loss {self.loss_now:.4f} after {format_duration(self.elapsed_s)}; with {self.more_minutes:g} "
            f"more {minutes} about {self.loss:.4f} ({low:.4f} to {high:.4f}){per_byte}"
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


def forecast(run_dir: Path, more_minutes: float, text_slope: float | None = None) -> Forecast:
    """The forecast for a run that trained a model from scratch and is finished.

    text_slope: None is the one that was measured before the run, or that of a typical text.
    Raises UserError for any other run, and if it has no validation loss or no checkpoint to continue from.
    """
    run = read_finished_run(run_dir)
    known_slope = text_slope or run.args.text_slope
    slope = known_slope or TextNumbers(run.loss).slope_with(run.vocab_size)
    longer = run.bytes_read * (1 + 60 * more_minutes / run.elapsed_s)
    before, after = (
        LAW.relative_loss(run.size, text_bytes, text_bytes / run.text_bytes, slope)
        for text_bytes in (run.bytes_read, longer)
    )
    change = math.log(after / before)
    return Forecast(
        run_dir=run_dir,
        elapsed_s=run.elapsed_s,
        more_minutes=more_minutes,
        loss_now=run.loss,
        loss=run.loss * math.exp(change),
        spread=math.hypot(math.sqrt(2) * RUN_SPREAD, (SLOPE_SPREAD if known_slope else LAW_SPREAD) * change),
        bits_per_nat=run.bits_per_byte / run.loss if run.bits_per_byte else None,
    )


def known_or_measured_slope(run_dir: Path, report: Callable[[str], None] = lambda line: None) -> float:
    """The slope of a finished run's text, for `forecast`. Raises UserError as it does, and if the text is gone."""
    run = read_finished_run(run_dir)
    args = run.args
    if args.text_slope is not None:
        return args.text_slope
    report("training tiny models on a sample of the text ...")
    on_gpu = torch.cuda.is_available() and not args.use_cpu
    return measure_text(args, torch.device("cuda" if on_gpu else "cpu")).slope_with(run.vocab_size)


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
