"""Compare the time to a validation loss with nanoGPT."""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minigpt.config.presets import find_preset
from minigpt.training.trainer_command import trainer_command
from minigpt.utils.errors import UserError, first_line
from minigpt.utils.files import read_bytes
from minigpt.utils.formatting import markdown_table
from minigpt.utils.run_files import METRICS_FILE, read_metrics

PRESET = "shakespeare_char_cpu_fast"

NANOGPT_OPTIONS = (  # the command of nanoGPT's README for a CPU
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=1 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0"
)

BLOCK_SIZE = 64


@dataclass(frozen=True)
class Row:
    """One line of the table: a run of each trainer. Losses are nats per character over the validation split."""

    seed: int  # of MiniGPT's run; nanoGPT has a fixed one
    nanogpt_s: float
    nanogpt_loss: float
    minigpt_s: float
    minigpt_loss: float

    @property
    def ratio(self) -> float:
        """How many times as fast MiniGPT is."""
        return self.nanogpt_s / self.minigpt_s


def copy_nanogpt(nanogpt: Path, text: Path, folder: Path) -> Path:
    """Copy a checkout of nanoGPT into `folder` and prepare `text` there; the original is not changed."""
    checkout = folder / "nanogpt"
    try:
        shutil.copytree(nanogpt, checkout)
    except shutil.Error as error:
        raise UserError(f"nanogpt={nanogpt} cannot be copied: {first_line(error)}") from error
    data = checkout / "data" / "shakespeare_char"
    (data / "input.txt").write_bytes(read_bytes(text))
    _run([sys.executable, "prepare.py"], data)
    return checkout


def train_nanogpt(checkout: Path, steps: int) -> tuple[float, float]:
    """Train with nanoGPT's train.py. Returns the seconds of `steps` steps and the validation loss of its last model.

    nanoGPT prints the time of each step. The first step and the one after `steps` include an evaluation, so the mean
    time of the other steps is taken for every step.
    """
    options = f"{NANOGPT_OPTIONS} --max_iters={steps} --lr_decay_iters={steps} --eval_interval={steps}".split()
    output = _run([sys.executable, "train.py", *options], checkout)
    milliseconds = [float(number) for number in re.findall(r"^iter \d+: .*time ([\d.]+)ms", output, re.MULTILINE)]
    counted = milliseconds[1:steps]
    return sum(counted) / len(counted) * steps / 1e3, nanogpt_loss(checkout)


def nanogpt_loss(checkout: Path) -> float:
    """Mean loss of nanoGPT's saved model over every target of its validation split, nats."""
    import numpy as np
    import torch

    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module  # dataclasses look up their module in it
    spec.loader.exec_module(module)
    saved = torch.load(checkout / "out-shakespeare-char" / "ckpt.pt", weights_only=True, map_location="cpu")
    model = module.GPT(module.GPTConfig(**saved["model_args"])).eval()
    model.load_state_dict(saved["model"])
    ids = np.fromfile(checkout / "data" / "shakespeare_char" / "val.bin", dtype=np.uint16).astype(np.int64)
    inputs, targets = torch.from_numpy(ids[:-1]).split(BLOCK_SIZE), torch.from_numpy(ids[1:]).split(BLOCK_SIZE)
    with torch.inference_mode():
        losses = (float(model(x[None], y[None])[1]) * len(y) for x, y in zip(inputs, targets, strict=True))
        return sum(losses) / (len(ids) - 1)


def train_minigpt(preset: str, text: Path, seed: int, folder: Path) -> tuple[float, float]:
    """Train with train_accelerate.py and `preset`. Returns the seconds of training and the last validation loss."""
    run_dir = folder / "run"
    options = f"--cache_dir {folder / 'cache'} --output_dir {run_dir} --seed {seed} --block_size {BLOCK_SIZE} "
    options += "--overwrite_output_dir --eval_steps 0 --save_steps 0 --report_to none --use_cpu"
    preset_file = str(find_preset(preset).absolute())
    _run(trainer_command([preset_file, "--train_file", str(text), *options.split()]), Path.cwd())
    lines = read_metrics(run_dir / METRICS_FILE)
    last = next(line for line in reversed(lines) if "val/loss" in line)
    return last["elapsed_s"], last["val/loss"]


def _run(words: Sequence[str], folder: Path) -> str:
    """Run a command in `folder` and return what it prints. Raises RuntimeError with its output if it fails."""
    process = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{process.stdout[-1000:]}\n{process.stderr[-2000:]}")
    return process.stdout


def markdown(rows: Sequence[Row], target_loss: float) -> str:
    """The table."""
    head = (
        "seed",
        "nanoGPT, s",
        "nanoGPT's loss",
        "MiniGPT, s",
        "MiniGPT's loss",
        f"<= {target_loss}",
        "MiniGPT is … times as fast",
    )
    cells = (
        (
            str(row.seed),
            f"{row.nanogpt_s:.1f}",
            f"{row.nanogpt_loss:.4f}",
            f"{row.minigpt_s:.1f}",
            f"{row.minigpt_loss:.4f}",
            "yes" if row.minigpt_loss <= target_loss else "no",
            f"{row.ratio:.2f}",
        )
        for row in rows
    )
    return markdown_table(head, cells, numeric=True)
