"""Does a resumed run end where an uninterrupted one does? `minigpt verify-resume CONFIG` proves it for your own run.

    minigpt verify-resume configs/Y.yaml [--steps 20] [--stop_after 10] [--config_file accelerate_configs/X.yaml]
                                         [any option of the trainer]

Trains `steps` steps straight, then goes on from the checkpoint after `stop_after` in a new process, and compares every
loss, gradient norm, weight and moment, bit for bit. Exit code 0: equal; 1: not, and it says where they first differ.
"""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minigpt.errors import OneLineParser

COMPARED = ("train/loss", "train/grad_norm", "train/lr", "val/loss")


def main(argv: list[str]) -> None:
    """`minigpt verify-resume`. Raises ValueError in one line on bad input."""
    parser = OneLineParser(
        "minigpt verify-resume",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="what to train, a YAML file")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="length of the runs (default: %(default)s)")
    parser.add_argument("--stop_after", type=int, metavar="K", help="the step to go on from (default: half of them)")
    parser.add_argument("--config_file", metavar="FILE", help="launch profile (default: one process)")
    args, options = parser.parse_known_args(argv)
    stop_after = args.steps // 2 if args.stop_after is None else args.stop_after
    if not 0 < stop_after < args.steps:
        raise ValueError(f"stop_after={stop_after} must be above 0 and below steps={args.steps}")
    with tempfile.TemporaryDirectory(prefix="verify-resume-") as folder:
        straight, resumed = Path(folder, "straight"), Path(folder, "resumed")
        words = [args.config, *options, *overrides(args.config, options, args.steps, stop_after)]
        print(f"training {args.steps} steps straight", flush=True)
        train(args.config_file, [*words, "--output_dir", str(straight)])
        resumed.mkdir()
        shutil.copytree(straight / f"checkpoint-{stop_after}", resumed / f"checkpoint-{stop_after}")
        print(f"going on from step {stop_after}", flush=True)
        train(args.config_file, [*words, "--output_dir", str(resumed), "--resume_from_checkpoint", "latest"])
        difference = next(differences(straight, resumed, stop_after, args.steps), None)
    if difference is not None:
        print(f"NOT the same: {difference}")
        sys.exit(1)
    print(f"the same, bit for bit: losses, gradient norms, weights and moments after step {args.steps}")


def overrides(config: str, options: list[str], steps: int, stop_after: int) -> list[str]:
    """Options that make the run short and quiet; all that decides its arithmetic stays."""
    from minigpt.command_line import parse_arguments

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
    """Run the trainer to its end. Raises ValueError with its last words where it fails."""
    found = importlib.util.find_spec("train_accelerate")
    if found is None or found.origin is None:
        raise ValueError("train_accelerate.py is not to be found; run this from a checkout of the project")
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", config_file or ""]
    command = [sys.executable, *(launcher if config_file else []), found.origin, *words]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        said = [line for line in run.stderr.splitlines() if line.startswith("train_accelerate.py")]
        raise ValueError("the training failed: " + (said or run.stderr.splitlines() or ["without a word"])[-1])


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
