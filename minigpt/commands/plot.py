"""Draw the curves of one or several runs into loss.png and loss.pdf."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from minigpt.utils.command_line import CommandParser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt plot`."""
    parser = CommandParser("minigpt plot", __doc__)
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a run")
    parser.add_argument(
        "--output_dir",
        type=Path,
        metavar="DIR",
        help="folder for the figures (default: the run's folder; for several runs, the current folder)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace figures that exist")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Draw the figures and print their paths."""
    from minigpt.training.plot import plot_runs

    for file in plot_runs(args.run_dirs, args.output_dir, args.overwrite):
        print(file)
