"""A branch of a finished run: a copy that goes on for a short time shows how the loss would change in a longer one."""

import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from minigpt.config.arguments import RunArguments
from minigpt.experiments.runs import PlannedRun
from minigpt.planning.forecast import FinishedRun, Forecast, forecast, read_finished_run
from minigpt.utils.files import write_atomically

SHARE, LONGEST = 0.5, 5.0  # of the longer continuation; minutes
DEVICE_OPTIONS = (
    "use_cpu", "mixed_precision", "tf32", "full_determinism", "torch_compile", "torch_compile_backend",
    "gradient_checkpointing",
)  # fmt: skip
QUIET = {"eval_steps": 0, "save_steps": 0, "sample_max_new_tokens": 1, "report_to": ["none"]}


def default_branch_minutes(more_minutes: float) -> float:
    """How long the branch trains that shows what `more_minutes` would bring."""
    return min(SHARE * more_minutes, LONGEST)


def forecast_with_branch(run_dir: Path, more_minutes: float, branch_minutes: float) -> Forecast:
    """The forecast with a branch that is trained for it and deleted. Raises as `train_branch` does."""
    read_finished_run(run_dir)  # else there is no folder to train in
    place = run_dir.resolve()  # not "."
    with tempfile.TemporaryDirectory(prefix=f".{place.name}-branch-", dir=place.parent) as folder:
        return forecast(run_dir, more_minutes, train_branch(run_dir, branch_minutes, Path(folder) / "branch"))


def train_branch(
    run_dir: Path, minutes: float, branch_dir: Path, environment: Mapping[str, str] | None = None
) -> FinishedRun:
    """What the run is after the branch, which is trained in a process of its own, on one device, unless it is there.

    `environment` is added to that of the process. Raises as `read_finished_run` and `PlannedRun.train_on` do.
    """
    options = branch_options(read_finished_run(run_dir), minutes)
    preset = branch_dir.with_name(f"{branch_dir.name}.yaml")
    write_atomically(preset, yaml.safe_dump(options))
    PlannedRun([str(preset)], branch_dir).train_on(run_dir, environment)
    return read_finished_run(branch_dir)


def branch_options(run: FinishedRun, minutes: float) -> dict[str, Any]:
    """The options of the run that decide what it computes, with the time of the branch; nothing is reported."""
    left_out = {option.name for option in fields(RunArguments)} - set(DEVICE_OPTIONS) | {"num_decay_steps"}
    options = {name: value for name, value in yaml.safe_load(run.args.as_yaml()).items() if name not in left_out}
    return options | QUIET | {"train_minutes": run.elapsed_s / 60 + minutes}
