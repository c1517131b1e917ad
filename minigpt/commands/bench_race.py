"""Train nanoGPT's recipe for one GPU on a CPU for a fixed time, beside MiniGPT with the same model, and draw both.

    minigpt bench race --nanogpt DIR --train_file tinyshakespeare.txt --minutes 20 --picture race.png

Both train at the same time, with one thread each. Evaluations are taken out of both clocks.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from minigpt.utils.command_line import CommandParser, check_output_file
from minigpt.utils.errors import UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt bench race`."""
    from minigpt.benchmarks.report import add_report_option, check_options

    parser = CommandParser("minigpt bench race", __doc__)
    add = parser.add_argument
    add("--nanogpt", required=True, metavar="DIR", help="a checkout of nanoGPT; it is copied, not changed")
    add("--train_file", required=True, metavar="FILE", help="Tiny Shakespeare; the last tenth is for validation")
    add("--minutes", type=float, default=20.0, metavar="N", help="time of each training (default: %(default)s)")
    add("--picture", metavar="FILE", help="draw the curves into this PNG, PDF or SVG")
    add_report_option(parser)
    args = parser.parse_args(argv)
    check_options(args, "minutes")
    check_output_file(args, "picture")
    for name in ("train.py", "data/shakespeare_char/prepare.py"):
        if not Path(args.nanogpt, name).is_file():
            raise UserError(f"nanogpt={args.nanogpt}: no {name} there; give a checkout of nanoGPT")
    if not Path(args.train_file).is_file():
        raise UserError(f"train_file={args.train_file}: no such file")
    return args


def run(args: argparse.Namespace) -> None:
    """Train both, print the table and draw the curves."""
    from minigpt.benchmarks.race import draw, race, table
    from minigpt.benchmarks.report import write_report

    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = race(Path(args.nanogpt), Path(args.train_file).absolute(), args.minutes, Path(folder))
    if args.picture is not None:
        draw(theirs, ours, Path(args.picture))
    figures = {"minutes": args.minutes, "nanogpt": theirs, "minigpt": ours}
    write_report(
        figures, table(theirs, ours, args.minutes), device="cpu", output=args.output, conditions="One thread for each."
    )
