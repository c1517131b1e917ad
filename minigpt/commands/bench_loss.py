"""Measure the time to a validation loss beside nanoGPT."""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from minigpt.utils.errors import CommandParser, UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt bench loss`."""
    parser = CommandParser("minigpt bench loss", __doc__)
    add = parser.add_argument
    add("--nanogpt", required=True, metavar="DIR", help="a checkout of nanoGPT; it is copied, not changed")
    add("--train_file", required=True, metavar="FILE", help="Tiny Shakespeare; the last tenth is for validation")
    add("--preset", metavar="FILE", help="what we train (default: configs/shakespeare_char_cpu_fast.yaml)")
    add("--to_loss", type=float, default=1.898, help="nats a character (default: %(default)s, what nanoGPT reaches)")
    add("--seeds", type=int, nargs="+", default=[1337, 1, 2], metavar="N", help="a turn of both for each of ours")
    add("--nanogpt_steps", type=int, default=2000, metavar="N", help="default: %(default)s, as published")
    add("--output", metavar="FILE", help="write FILE.json and FILE.md too")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """`minigpt bench loss`. Raises UserError where nanoGPT or the text is not to be found."""
    from minigpt.benchmarks.loss import _run, markdown, train_minigpt, train_nanogpt
    from minigpt.benchmarks.report import describe_machine, machine, show

    if not Path(args.nanogpt, "train.py").is_file():
        raise UserError(f"nanogpt={args.nanogpt}: no train.py there; give a checkout of nanoGPT")
    if not Path(args.train_file).is_file():
        raise UserError(f"train_file={args.train_file}: no such file")
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
