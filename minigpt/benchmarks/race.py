"""nanoGPT's recipe for one GPU and MiniGPT with the same model and time on a CPU, side by side: loss against time.

Both train at the same time, each on a thread of its own, so that other load on the machine affects them alike. Only
training counts: evaluations are taken out of both clocks. Losses are nats per character of the validation split.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import yaml

from minigpt.benchmarks.loss import copy_nanogpt
from minigpt.training.trainer_command import trainer_command
from minigpt.utils.formatting import markdown_table
from minigpt.utils.run_files import METRICS_FILE, read_metrics

Curve = list[tuple[float, float]]  # seconds of training, validation loss

NANOGPT_OPTIONS = (  # the recipe itself is config/train_shakespeare_char.py
    "config/train_shakespeare_char.py --device=cpu --compile=False --log_interval=1 --eval_interval=10 --eval_iters=4"
)
PRESET = {  # the model of the recipe; the recipe of the quickstart, with the step size of a wider model
    "tokenizer": "char", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "block_size": 256,
    "dropout": 0.0, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 32, "optimizer": "muon",
    "learning_rate": 5e-3, "muon_learning_rate": 0.02, "muon_momentum": 0.95, "lr_scheduler_type": "linear",
    "warmup_steps": 10, "weight_decay": 0.1, "logging_steps": 10, "eval_steps": 100, "save_steps": 0,
    "sample_max_new_tokens": 1, "report_to": "none",
}  # fmt: skip
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
LOOK_EVERY_S = 2.0


def race(nanogpt: Path, text: Path, minutes: float, folder: Path) -> tuple[Curve, Curve]:
    """The curves of nanoGPT and of MiniGPT, both trained for `minutes` in `folder`."""
    checkout = copy_nanogpt(nanogpt, text, folder)
    preset, run_dir, log = folder / "race.yaml", folder / "minigpt", folder / "nanogpt.log"
    preset.write_text(yaml.safe_dump(PRESET | {"train_file": str(text), "train_minutes": minutes}), encoding="utf-8")
    environment = os.environ | ONE_THREAD
    ours = trainer_command([str(preset), "--output_dir", str(run_dir), "--use_cpu"])
    theirs = [sys.executable, "-u", "train.py", *NANOGPT_OPTIONS.split()]
    with (
        log.open("w") as lines,
        subprocess.Popen(theirs, cwd=checkout, env=environment, stdout=lines, stderr=lines) as nanogpt_run,
    ):
        try:
            finished = subprocess.run(ours, env=environment, capture_output=True, text=True)
            if finished.returncode:
                raise RuntimeError(f"MiniGPT failed:\n{finished.stderr[-2000:]}")
            while nanogpt_run.poll() is None and trained_s(log.read_text(encoding="utf-8")) < 60 * minutes:
                time.sleep(LOOK_EVERY_S)
        finally:
            nanogpt_run.terminate()
    measured = [line for line in read_metrics(run_dir / METRICS_FILE) if "val/loss" in line]
    return nanogpt_curve(log.read_text(encoding="utf-8")), [(line["elapsed_s"], line["val/loss"]) for line in measured]


def nanogpt_curve(log: str) -> Curve:
    """Training time and estimated validation loss at each evaluation in the output of nanoGPT's train.py.

    It prints the time of every step. That of a step with an evaluation includes the evaluation, so the mean of the
    other steps stands for it.
    """
    evaluations = {int(step): float(loss) for step, loss in re.findall(r"^step (\d+):.* val loss ([\d.]+)", log, re.M)}
    steps = {int(step): float(ms) / 1e3 for step, ms in re.findall(r"^iter (\d+): .*time ([\d.]+)ms", log, re.M)}
    plain = [seconds for step, seconds in steps.items() if step not in evaluations]
    mean = sum(plain) / len(plain) if plain else 0.0
    curve, elapsed = [], 0.0
    for step in range(max(steps, default=-1) + 1):
        if step in evaluations:
            curve.append((elapsed, evaluations[step]))
        elapsed += mean if step in evaluations else steps.get(step, mean)
    return curve


def trained_s(log: str) -> float:
    """Seconds of training up to the last evaluation."""
    return max((seconds for seconds, _ in nanogpt_curve(log)), default=0.0)


def table(theirs: Curve, ours: Curve, minutes: float) -> str:
    """The losses at quarters of the time: of the last evaluation before each."""
    rows = []
    for quarter in range(1, 5):
        until = quarter * minutes * 15
        losses = [[loss for seconds, loss in curve if seconds <= 1.01 * until][-1:] for curve in (theirs, ours)]
        rows.append((f"{until / 60:g}", *(f"{loss[0]:.3f}" if loss else "" for loss in losses)))
    return markdown_table(("minutes", "nanoGPT", "MiniGPT"), rows, numeric=True)


def draw(theirs: Curve, ours: Curve, file: Path) -> None:
    """Both curves in one picture."""
    from minigpt.training.plot import COLORS, STYLE, import_pyplot

    pyplot = import_pyplot()
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        for name, curve, color in (("nanoGPT", theirs, COLORS[1]), ("MiniGPT", ours, COLORS[0])):
            seconds, losses = zip(*curve, strict=True)
            axes.plot([second / 60 for second in seconds], losses, color=color, marker=".", label=name)
        axes.set(xlabel="minutes of training", ylabel="validation loss (nats per character)")
        axes.legend(frameon=False)
        figure.savefig(file, dpi=120)
        pyplot.close(figure)
