"""Verify that a resumed run equals an uninterrupted one, bit for bit."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

from minigpt.training.trainer_command import trainer_command
from minigpt.utils.errors import UserError
from minigpt.utils.run_files import (
    ADAPTER_WEIGHTS,
    METRICS_FILE,
    OPTIMIZER_FILES,
    WEIGHT_FILES,
    find_files,
    read_metrics,
)

COMPARED_METRICS = ("train/loss", "train/grad_norm", "train/lr", "val/loss")


def short_run_options(config: str, options: list[str], steps: int, stop_after: int) -> list[str]:
    """Options that make the run short and quiet. Everything else that decides its arithmetic stays as it is.

    Raises UserError if `config` or `options` are not valid.
    """
    from minigpt.config.parser import parse_arguments

    args = parse_arguments([config, *options], config, program="minigpt verify-resume")
    quiet = {"report_to": "none", "push_to_hub": False, "overwrite_output_dir": False, "load_best_model_at_end": False}
    short = {
        "max_steps": steps,
        "train_minutes": 0,
        "warmup_steps": min(args.warmup_steps, steps // 2),
        "logging_steps": 1,
        "eval_steps": stop_after,
        "save_steps": stop_after,
        "save_total_limit": steps,
        "sample_steps": 0,
        "sample_max_new_tokens": 1,
    }
    return [word for name, value in {**quiet, **short}.items() for word in (f"--{name}", str(value))]


def run_trainer(profile: str | None, options: list[str]) -> None:
    """Run the trainer to its end, through `accelerate launch` if a launch profile is given.

    Raises UserError with the trainer's message if it refuses its input, RuntimeError with its output if it crashes.
    """
    run = subprocess.run(trainer_command(options, profile), capture_output=True, text=True)
    if run.returncode == 0:
        return
    messages = [line for line in run.stderr.splitlines() if line.startswith("train_accelerate.py")]
    if messages:
        raise UserError(f"the training failed: {messages[-1]}")
    raise RuntimeError(f"the training failed with exit code {run.returncode}:\n{run.stderr or run.stdout}")


def differences(uninterrupted: Path, resumed: Path, stop_after: int, steps: int) -> Iterator[str]:
    """A sentence for each number in which two runs differ after step `stop_after`, the earliest first."""
    expected, actual = _compared_metrics(uninterrupted), _compared_metrics(resumed)
    for step in range(stop_after + 1, steps + 1):
        for name in COMPARED_METRICS:
            if actual.get((step, name)) != expected.get((step, name)):
                yield f"{name} of step {step} is {actual.get((step, name))} instead of {expected.get((step, name))}"
    from safetensors.torch import load_file

    is_adapter = (uninterrupted / f"checkpoint-{steps}" / ADAPTER_WEIGHTS).is_file()
    for patterns in ((ADAPTER_WEIGHTS,) if is_adapter else WEIGHT_FILES, OPTIMIZER_FILES):
        first, second = (
            {
                name: tensor
                for file in find_files(run / f"checkpoint-{steps}", patterns)
                if file.suffix == ".safetensors"
                for name, tensor in load_file(file).items()
            }
            for run in (uninterrupted, resumed)
        )
        for name in sorted(first.keys() | second.keys()):
            if name not in first or name not in second:
                yield f"{name} after step {steps} is in one of the runs only"
            elif not first[name].equal(second[name]):
                largest = (first[name] - second[name]).abs().max().item()
                yield f"{name} after step {steps}: largest difference {largest}"


def _compared_metrics(run_dir: Path) -> dict[tuple[int, str], float]:
    """(step, metric name) → value."""
    lines = read_metrics(run_dir / METRICS_FILE)
    return {(int(line["step"]), name): line[name] for line in lines for name in COMPARED_METRICS if name in line}
