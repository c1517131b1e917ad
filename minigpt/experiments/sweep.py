"""Train a grid of options and rank the results; with successive halving, short runs decide who trains longer."""

import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from minigpt.config.arguments import Arguments
from minigpt.experiments.runs import PlannedRun, Result
from minigpt.utils.errors import UserError
from minigpt.utils.files import write_atomically
from minigpt.utils.formatting import format_duration, markdown_table
from minigpt.utils.resources import usable_cores

SWEEP_FILE, PICTURE_FILE = "sweep.json", "sweep.png"
PROGRAM = "minigpt sweep"

Values = dict[str, str]  # one value for every swept option, as written on the command line


@dataclass(frozen=True)
class Trial:
    """One point of the grid in one round: its values, how long it was trained, and the result."""

    values: Values
    length: str
    result: Result

    @property
    def name(self) -> str:
        return trial_name(self.values)


@dataclass(frozen=True)
class Sweep:
    """All trials, the best first: those of the last round, then those that were dropped before."""

    options: Sequence[str]
    trials: Sequence[Trial]

    @property
    def is_per_byte(self) -> bool:
        """Whether all losses are known in bits per byte, which runs with different tokenizers can be compared in."""
        return all(trial.result.diverged or trial.result.bits_per_byte is not None for trial in self.trials)

    def loss(self, trial: Trial) -> float:
        """What trials are ranked by: bits per byte, or nats per token where the bytes of the text are unknown."""
        return trial.result.bits_per_byte or math.inf if self.is_per_byte else trial.result.loss

    def as_dict(self) -> dict[str, Any]:
        """The table as JSON has it; a run that diverged has no loss."""
        return {
            "options": list(self.options),
            "trials": [
                {
                    **trial.values,
                    "length": trial.length,
                    "val/loss": None if trial.result.diverged else trial.result.loss,
                    "val/bits_per_byte": trial.result.bits_per_byte,
                    "elapsed_s": None if trial.result.diverged else trial.result.elapsed_s,
                    "run_dir": str(trial.result.run_dir),
                }
                for trial in self.trials
            ],
        }

    def as_table(self) -> str:
        """The trials as a table."""
        head = (*self.options, "length", "val/loss", "bits per byte", "time")
        rows = []
        for trial in self.trials:
            result = trial.result
            loss = "diverged" if result.diverged else f"{result.loss:.4f}"
            bits = f"{result.bits_per_byte:.4f}" if result.bits_per_byte is not None else "-"
            time = "-" if result.diverged else format_duration(result.elapsed_s)
            rows.append((*(trial.values[name] for name in self.options), trial.length, loss, bits, time))
        return markdown_table(head, rows)


def trial_name(values: Values) -> str:
    """The folder of a trial: learning_rate=1e-3,hidden_size=128; a slash in a value becomes an underscore."""
    return ",".join(f"{name}={value}" for name, value in values.items()).replace("/", "_")


def grid(options: Mapping[str, Sequence[str]]) -> list[Values]:
    """All combinations of the values of all options."""
    return [dict(zip(options, point, strict=True)) for point in itertools.product(*options.values())]


def rounds(points: int, halving: int) -> list[tuple[int, int]]:
    """Successive halving: how many points each round trains, and by what its length is divided; the last one is whole.

    Every round keeps the best 1/`halving` of its points, rounded up, and trains them `halving` times as long. Each
    round's runs start again with a schedule of their own length: in the middle of a longer one, a low learning rate
    would look better than it is.
    Source: Jamieson and Talwalkar 2016 (https://arxiv.org/abs/1502.07943).
    """
    counts = [points]
    while counts[-1] > 1:
        counts.append(math.ceil(counts[-1] / halving))
    if len(counts) > 1:
        counts.pop()  # a last round of one point would decide nothing
    last = len(counts) - 1
    return [(count, halving ** (last - number)) for number, count in enumerate(counts)]


def sweep(
    words: Sequence[str],
    options: Mapping[str, Sequence[str]],
    output_dir: Path,
    *,
    parallel: int = 1,
    halving: int | None = None,
    profile: str | None = None,
    report: Callable[[str], None] = print,
) -> Sweep:
    """Train the configuration `words` with every combination of `options`, `parallel` runs at a time.

    halving: with successive halving, the share of each round that stays is one in so many.
    All combinations are checked before the first run. Finished runs in `output_dir` are not trained again. Writes
    sweep.json and sweep.png. Raises UserError if a combination is not valid, or `halving` has no length to shorten.
    """
    points = grid(options)
    for values in points:
        plan, args = _planned(words, values, output_dir / trial_name(values))
        plan.state(args)
        if halving is not None and args.max_steps is None and not args.train_minutes:
            raise UserError("halving shortens max_steps or train_minutes; give one of them")
    dropped: list[Trial] = []
    trials: list[Trial] = []
    for count, divisor in [(len(points), 1)] if halving is None else rounds(len(points), halving):
        if trials:
            dropped = trials[count:] + dropped
            points = [trial.values for trial in trials[:count]]
        plans = [_planned_round(words, values, output_dir, divisor) for values in points]
        results = _train_all(plans, parallel, profile, output_dir.name, report)
        trials = [
            Trial(values, length_of(args), result)
            for values, (_, args), result in zip(points, plans, results, strict=True)
        ]
        trials.sort(key=Sweep(list(options), trials).loss)
        done = Sweep(list(options), trials + dropped)
        write_atomically(output_dir / SWEEP_FILE, json.dumps(done.as_dict(), indent=2) + "\n")
    draw(done, output_dir / PICTURE_FILE)
    return done


def _planned(words: Sequence[str], values: Values, run_dir: Path) -> tuple[PlannedRun, Arguments]:
    plan = PlannedRun([*words, *(f"--{name}={value}" for name, value in values.items())], run_dir)
    return plan, plan.arguments(PROGRAM)


def _planned_round(
    words: Sequence[str], values: Values, output_dir: Path, divisor: int
) -> tuple[PlannedRun, Arguments]:
    """A run of a round that is `divisor` times as short as the configuration."""
    plan, args = _planned(words, values, output_dir / trial_name(values))
    if divisor == 1:
        return plan, args
    shorter = {"warmup_steps": str(args.warmup_steps if args.warmup_steps < 1 else args.warmup_steps // divisor)}
    if args.train_minutes:
        shorter["train_minutes"] = str(args.train_minutes / divisor)
    elif args.max_steps is not None:
        shorter["max_steps"] = str(max(1, args.max_steps // divisor))
    if args.num_decay_steps is not None:
        shorter["num_decay_steps"] = str(max(1, args.num_decay_steps // divisor))
    return _planned(words, values | shorter, output_dir / f"1_of_{divisor}" / trial_name(values))


def length_of(args: Arguments) -> str:
    """The length of a run as the table shows it."""
    if args.train_minutes:
        return f"{args.train_minutes:g} min"
    return f"{args.max_steps} steps" if args.max_steps is not None else f"{args.num_train_epochs:g} epochs"


def _train_all(
    plans: Sequence[tuple[PlannedRun, Arguments]],
    parallel: int,
    profile: str | None,
    group: str,
    report: Callable[[str], None],
) -> list[Result]:
    """The results of the runs, `parallel` of them at a time, each on its share of the cores or on a GPU of its own."""
    slots: SimpleQueue[int] = SimpleQueue()
    for slot in range(parallel):
        slots.put(slot)

    def train(plan: PlannedRun, args: Arguments) -> Result:
        slot = slots.get()
        try:
            result = plan.train(args, profile, {"WANDB_RUN_GROUP": group, **_share_of_machine(slot, parallel)})
        finally:
            slots.put(slot)
        loss = "diverged" if result.diverged else f"val/loss {result.loss:.4f} after {result.elapsed_s:.0f} s"
        report(f"{plan.run_dir.name}: {loss}")
        return result

    with ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(train, plan, args) for plan, args in plans]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _share_of_machine(slot: int, parallel: int) -> dict[str, str]:
    """Environment variables that keep runs at the same time out of each other's way."""
    if parallel == 1:
        return {}
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
        devices = visible.split(",")
        return {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]}
    return {"OMP_NUM_THREADS": str(max(1, usable_cores() // parallel))}


def draw(sweep: Sweep, file: Path) -> None:
    """A panel for each option: the loss over its values, and a line through the best at each value."""
    from minigpt.training.plot import COLORS, STYLE, import_pyplot

    pyplot = import_pyplot()
    trials = [t for t in sweep.trials if not t.result.diverged and t.length == sweep.trials[0].length]
    if not trials:
        return
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(
            1, len(sweep.options), figsize=(1 + 3 * len(sweep.options), 3), sharey=True, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for name, panel in zip(sweep.options, panels[0], strict=True):
            values = sorted({trial.values[name] for trial in trials}, key=_sort_key)
            numbers = [_number(value) for value in values]
            is_numeric = all(number is not None and number > 0 for number in numbers)
            places = dict(zip(values, numbers if is_numeric else range(len(values)), strict=True))
            losses = {value: [sweep.loss(t) for t in trials if t.values[name] == value] for value in values}
            for value in values:
                panel.plot([places[value]] * len(losses[value]), losses[value], "o", color=COLORS[0], alpha=0.4)
            panel.plot(list(places.values()), [min(losses[value]) for value in values], color=COLORS[0])
            if is_numeric:
                panel.set_xscale("log")
            panel.set_xticks(list(places.values()), list(places), minor=False)
            panel.set_xticks([], minor=True)
            panel.set_xlabel(name)
        panels[0][0].set_ylabel(f"validation loss\n({'bits per byte' if sweep.is_per_byte else 'nats per token'})")
        figure.savefig(file, dpi=150)
        pyplot.close(figure)


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _sort_key(value: str) -> tuple[bool, float, str]:
    number = _number(value)
    return number is None, number or 0.0, value
