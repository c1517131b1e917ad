"""Measure training beside nanoGPT and transformers' Trainer."""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minigpt.utils.errors import CommandParser, UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt bench train`."""
    from minigpt.benchmarks.train import SHAPES, WAYS

    parser = CommandParser("minigpt bench train", __doc__)
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="124m", help="124m: GPT-2; shakespeare: nanoGPT's CPU recipe")
    for name in SHAPES["124m"]:
        add(f"--{name}", type=int, metavar="N", help="default: the shape's")
    add("--ways", nargs="+", choices=WAYS, metavar="WAY", help=f"of {', '.join(WAYS)}; default: all on one process")
    add("--nanogpt", metavar="DIR", help="a checkout of nanoGPT; its model.py is imported as it is")
    add("--mixed_precision", choices=["no", "bf16"], default="bf16", help="of all but nanogpt (default: %(default)s)")
    add("--compile", action="store_true", help="compile every model")
    add("--gradient_checkpointing", choices=["no", "selective", "full"], default="no", help="of minigpt alone")
    add("--turns", type=int, default=5, metavar="N", help="turns of every way (default: %(default)s)")
    add("--steps", type=int, default=4, metavar="N", help="timed steps a turn (default: %(default)s)")
    add("--warmup", type=int, default=2, metavar="N", help="steps before them (default: %(default)s)")
    add_machine_arguments(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """`minigpt bench train`. Raises UserError on numbers that cannot be and on a checkout that is none."""
    from minigpt.benchmarks.report import machine, show
    from minigpt.benchmarks.train import (
        ALONE,
        OPTIONS,
        SHAPES,
        describe,
        markdown,
        matrix_product_flops,
        summarize,
        take_turn,
    )

    for name in ("turns", "steps", "warmup"):
        if getattr(args, name) < 1:
            raise UserError(f"{name}={getattr(args, name)} must be at least 1")
    ways = args.ways or [way for way in ALONE if args.nanogpt or not way.startswith("nanogpt")]
    if "minigpt" not in ways:
        raise UserError("ways must hold minigpt: the ratios are to it")
    if "minigpt-ddp" in ways and (args.batch_size or SHAPES[args.shape]["batch_size"]) % 2:
        raise UserError("minigpt-ddp splits the batch over two processes; give an even --batch_size")
    if any(way.startswith("nanogpt") for way in ways) and not Path(args.nanogpt or "", "model.py").is_file():
        raise UserError(f"nanogpt={args.nanogpt}: no model.py there; give a checkout of nanoGPT, or other --ways")

    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    shape = {name: getattr(args, name) or value for name, value in SHAPES[args.shape].items()}
    ceiling = matrix_product_flops(device, args.mixed_precision == "bf16", args.threads)
    turns: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.turns):
            for way in ways:
                turn = take_turn(way, shape, args, device, Path(folder))
                turns[way].append(turn)
                print(f"turn {number + 1} {way}: {statistics.median(turn['seconds']) * 1e3:.1f} ms a step", flush=True)
    rows = summarize(turns, shape, ceiling)
    about = {name: value for name, value in vars(args).items() if name in OPTIONS}
    report = {"machine": machine(device), "shape": shape, "options": about, "matrix_product_flops": ceiling}
    report |= {"rows": [asdict(row) for row in rows], "turns": turns}
    text = describe(report) + "\n\n" + markdown(rows)
    show(report, text, args.output)


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """`--device`, `--threads` and `--output`."""
    add = parser.add_argument
    add("--device", default=None, metavar="D", help="default: a GPU if there is one, else the CPU")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's own choice)")
    add("--output", metavar="FILE", help="write FILE.json and FILE.md too")
