"""Compare the time to a validation loss with nanoGPT.

nanoGPT trains on a CPU with the command of its README, MiniGPT with a preset of the same model and data, in turns.
Set-up, evaluation and saving are not counted.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from minigpt.utils.command_line import CommandParser
from minigpt.utils.errors import UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt bench loss`."""
    from minigpt.benchmarks.loss import PRESET
    from minigpt.benchmarks.report import add_report_option, check_options
    from minigpt.config.presets import find_preset

    parser = CommandParser("minigpt bench loss", __doc__)
    add = parser.add_argument
    add("--nanogpt", required=True, metavar="DIR", help="a checkout of nanoGPT; it is copied, not changed")
    add("--train_file", required=True, metavar="FILE", help="Tiny Shakespeare; the last tenth is for validation")
    add("--preset", default=PRESET, help="name or YAML file of MiniGPT's preset (default: %(default)s)")
    add(
        "--target_loss",
        type=float,
        default=1.898,
        metavar="X",
        help="nats per character (default: %(default)s, nanoGPT's own result)",
    )
    add(
        "--seeds", type=int, nargs="+", default=[1337, 1, 2], metavar="N", help="one turn per seed (default: 1337 1 2)"
    )
    add("--nanogpt_steps", type=int, default=2000, metavar="N", help="default: %(default)s, as published")
    add_report_option(parser)
    args = parser.parse_args(argv)

    check_options(args, "target_loss")
    if args.nanogpt_steps < 2:
        raise UserError(f"nanogpt_steps={args.nanogpt_steps} must be at least 2: the first step is not timed")
    if not Path(args.nanogpt, "train.py").is_file():
        raise UserError(f"nanogpt={args.nanogpt}: no train.py there; give a checkout of nanoGPT")
    if not Path(args.train_file).is_file():
        raise UserError(f"train_file={args.train_file}: no such file")
    find_preset(args.preset)
    prepare = Path("data", "shakespeare_char", "prepare.py")
    if not Path(args.nanogpt, prepare).is_file():
        raise UserError(f"nanogpt={args.nanogpt}: no {prepare} there; give a checkout of nanoGPT")
    return args


def run(args: argparse.Namespace) -> None:
    """Train in turns and print the table."""
    from minigpt.benchmarks.loss import Row, copy_nanogpt, markdown, train_minigpt, train_nanogpt
    from minigpt.benchmarks.report import write_report

    text = Path(args.train_file).absolute()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        checkout = copy_nanogpt(Path(args.nanogpt), text, Path(folder))
        for seed in args.seeds:
            nanogpt_s, nanogpt_loss = train_nanogpt(checkout, args.nanogpt_steps)
            minigpt_s, minigpt_loss = train_minigpt(args.preset, text, seed, Path(folder))
            rows.append(Row(seed, nanogpt_s, nanogpt_loss, minigpt_s, minigpt_loss))
            print(markdown(rows[-1:], args.target_loss).splitlines()[-1], flush=True)
    figures = {"target_loss": args.target_loss, "rows": [asdict(row) | {"ratio": row.ratio} for row in rows]}
    write_report(figures, markdown(rows, args.target_loss), device="cpu", output=args.output)
