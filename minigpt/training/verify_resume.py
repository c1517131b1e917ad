"""Verify that a resumed run equals an uninterrupted one, bit for bit."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minigpt.utils.errors import UserError

COMPARED = ("train/loss", "train/grad_norm", "train/lr", "val/loss")


def overrides(config: str, options: list[str], steps: int, stop_after: int) -> list[str]:
    """Options that make the run short and quiet; all that decides its arithmetic stays."""
    from minigpt.config.parser import parse_arguments

    args = parse_arguments([config, *options], config)
    quiet = {"report_to": "none", "push_to_hub": False, "overwrite_output_dir": False, "load_best_model_at_end": False}
    short = {
        "max_steps": steps,
        "warmup_steps": min(args.warmup_steps, steps // 2),
        "logging_steps": 1,
        "eval_steps": stop_after,
        "save_steps": stop_after,
        "save_total_limit": steps,
        "sample_steps": 0,
        "sample_max_new_tokens": 1,
    }
    return [word for name, value in {**quiet, **short}.items() for word in (f"--{name}", str(value))]


def train(config_file: str | None, words: list[str]) -> None:
    """Run the trainer to its end. Raises UserError with its last words where it fails."""
    found = importlib.util.find_spec("train_accelerate")
    if found is None or found.origin is None:
        raise UserError("train_accelerate.py is not to be found; run this from a checkout of the project")
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", config_file or ""]
    command = [sys.executable, *(launcher if config_file else []), found.origin, *words]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        said = [line for line in run.stderr.splitlines() if line.startswith("train_accelerate.py")]
        raise UserError("the training failed: " + (said or run.stderr.splitlines() or ["without a word"])[-1])


def differences(straight: Path, resumed: Path, stop_after: int, steps: int) -> Iterator[str]:
    """Where two runs are not the same bit for bit, in words, the earliest first."""
    ours, theirs = _metrics(straight), _metrics(resumed)
    for step in range(stop_after + 1, steps + 1):
        for name in COMPARED:
            if ours.get((step, name)) != theirs.get((step, name)):
                yield f"{name} of step {step} is {theirs.get((step, name))} instead of {ours.get((step, name))}"
    from safetensors.torch import load_file

    for file in ("model.safetensors", "optimizer.safetensors"):
        one, two = (load_file(run / f"checkpoint-{steps}" / file) for run in (straight, resumed))
        for name, tensor in one.items():
            if name not in two or not tensor.equal(two[name]):
                away = (tensor - two[name]).abs().max().item() if name in two else "missing"
                yield f"{name} of {file} after step {steps}: largest difference {away}"


def _metrics(run_dir: Path) -> dict[tuple[int, str], Any]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {(line["step"], name): line[name] for line in lines for name in COMPARED if name in line}
