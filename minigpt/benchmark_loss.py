"""How soon is a validation loss reached? `minigpt bench loss`: nanoGPT's CPU recipe against ours, in turns.

nanoGPT trains by its own train.py, in a copy of your checkout, with the command that its README gives for a CPU; its
seconds are the times that it prints for its steps, without the first, which holds an evaluation. Ours are `elapsed_s`.
Set-up and evaluation count for neither. Both models are judged alike: the mean loss over every target of the
validation split, in windows of 64 characters.
"""

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from minigpt.benchmark_report import describe_machine, machine, show

RECIPE = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=1 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0"
)
WINDOW = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `minigpt bench loss`."""
    add = parser.add_argument
    add("--nanogpt", required=True, metavar="DIR", help="a checkout of nanoGPT; it is copied, not changed")
    add("--train_file", required=True, metavar="FILE", help="Tiny Shakespeare; the last tenth is for validation")
    add("--preset", metavar="FILE", help="what we train (default: configs/shakespeare_char_cpu_fast.yaml)")
    add("--to_loss", type=float, default=1.898, help="nats a character (default: %(default)s, what nanoGPT reaches)")
    add("--seeds", type=int, nargs="+", default=[1337, 1, 2], metavar="N", help="a turn of both for each of ours")
    add("--nanogpt_steps", type=int, default=2000, metavar="N", help="default: %(default)s, as published")
    add("--output", metavar="FILE", help="write FILE.json and FILE.md too")


def main(args: argparse.Namespace) -> None:
    """`minigpt bench loss`. Raises ValueError where nanoGPT or the text is not to be found."""
    if not Path(args.nanogpt, "train.py").is_file():
        raise ValueError(f"nanogpt={args.nanogpt}: no train.py there; give a checkout of nanoGPT")
    if not Path(args.train_file).is_file():
        raise ValueError(f"train_file={args.train_file}: no such file")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkout = shutil.copytree(args.nanogpt, Path(folder, "nanogpt"))
        text = checkout / "data" / "shakespeare_char" / "input.txt"
        shutil.copyfile(args.train_file, text)
        _run([sys.executable, "prepare.py"], text.parent)
        for seed in args.seeds:
            theirs_s, theirs_loss = train_nanogpt(checkout, args.nanogpt_steps)
            ours_s, ours_loss = train_minigpt(args.preset, Path(args.train_file).absolute(), seed, Path(folder))
            row = {"seed": seed, "nanogpt_s": theirs_s, "nanogpt_loss": theirs_loss, "minigpt_s": ours_s}
            rows.append(row | {"minigpt_loss": ours_loss, "ratio": theirs_s / ours_s})
            print(markdown(rows[-1:], args.to_loss).splitlines()[-1], flush=True)
    report = {"machine": machine("cpu"), "to_loss": args.to_loss, "rows": rows}
    table = describe_machine(report["machine"]) + "\n\n" + markdown(rows, args.to_loss)
    show(report, table, args.output)


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
