"""Benchmark the time to a validation loss beside nanoGPT."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

RECIPE = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=1 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0"
)

WINDOW = 64


def train_nanogpt(checkout: Path, steps: int) -> tuple[float, float]:
    """Seconds of `steps` steps of its train.py, and the validation loss of the model that it saves behind them."""
    options = f"{RECIPE} --max_iters={steps} --lr_decay_iters={steps} --eval_interval={steps}".split()
    output = _run([sys.executable, "train.py", *options], checkout)
    milliseconds = [float(found) for found in re.findall(r"^iter \d+: .*time ([\d.]+)ms", output, re.MULTILINE)]
    counted = milliseconds[1:steps]  # the first holds an evaluation, and so does the one after `steps`
    return sum(counted) / len(counted) * steps / 1e3, nanogpt_loss(checkout)


def nanogpt_loss(checkout: Path) -> float:
    """Mean loss of nanoGPT's saved model over every target of its validation split, nats."""
    import numpy as np
    import torch

    specification = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["nanogpt_model"] = module  # its dataclass looks itself up there
    specification.loader.exec_module(module)
    saved = torch.load(checkout / "out-shakespeare-char" / "ckpt.pt", weights_only=True, map_location="cpu")
    model = module.GPT(module.GPTConfig(**saved["model_args"])).eval()
    model.load_state_dict(saved["model"])
    ids = np.fromfile(checkout / "data" / "shakespeare_char" / "val.bin", dtype=np.uint16).astype(np.int64)
    inputs, targets = torch.from_numpy(ids[:-1]).split(WINDOW), torch.from_numpy(ids[1:]).split(WINDOW)
    with torch.inference_mode():
        losses = (float(model(x[None], y[None])[1]) * len(y) for x, y in zip(inputs, targets, strict=True))
        return sum(losses) / (len(ids) - 1)


def train_minigpt(preset: str | None, text: Path, seed: int, folder: Path) -> tuple[float, float]:
    """`elapsed_s` and `val/loss` of the last step of a run of train_accelerate.py with the preset."""
    script = importlib.util.find_spec("train_accelerate")
    assert script is not None
    assert script.origin is not None
    preset = preset or str(Path(script.origin).parent / "configs" / "shakespeare_char_cpu_fast.yaml")
    run_dir = folder / "run"
    options = f"--train_file {text} --cache_dir {folder / 'cache'} --output_dir {run_dir} --seed {seed}"
    options += (
        f" --overwrite_output_dir --eval_steps 0 --save_steps 0 --report_to none --block_size {WINDOW} --use_cpu"
    )
    _run([sys.executable, script.origin, preset, *options.split()], Path.cwd())
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last: dict[str, Any] = next(line for line in map(json.loads, reversed(lines)) if "val/loss" in line)
    return last["elapsed_s"], last["val/loss"]


def _run(words: list[str], folder: Path) -> str:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def markdown(rows: list[dict[str, Any]], to_loss: float) -> str:
    """The table."""
    lines = [
        f"| our seed | nanoGPT, s | its loss | ours, s | our loss | <= {to_loss} | ours is … times as fast |",
        "| ---: | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for row in rows:
        reached = "yes" if row["minigpt_loss"] <= to_loss else "no"
        lines.append(
            f"| {row['seed']} | {row['nanogpt_s']:.1f} | {row['nanogpt_loss']:.4f} | {row['minigpt_s']:.1f} "
            f"| {row['minigpt_loss']:.4f} | {reached} | {row['ratio']:.2f} |"
        )
    return "\n".join(lines)
