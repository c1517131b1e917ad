"""Hold the choice of --train_minutes against six shapes by hand, and the forecast against more minutes.

    minigpt bench choice --text shakespeare=tinyshakespeare.txt --minutes 1 3 --parallel 2 --more_minutes 1

Every text and time takes seven runs of that many minutes. With --more_minutes, all of them are continued twice: for
half of that time, which the forecast is made from, and for all of it. A study that was interrupted continues.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from minigpt.utils.command_line import CommandParser, check_positive


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt bench choice`; `texts` are the files by name."""
    from minigpt.benchmarks.report import add_report_option, check_options, named_texts

    parser = CommandParser("minigpt bench choice", __doc__)
    add = parser.add_argument
    add("--text", action="append", required=True, metavar="NAME=FILE", help="a text; can be given several times")
    add("--minutes", type=float, nargs="+", default=[1.0], metavar="N", help="times of a run (default: 1)")
    add("--more_minutes", type=float, metavar="N", help="also continue every run for so many minutes")
    add("--output_dir", default="runs/choice", metavar="DIR", help="folder of all runs (default: %(default)s)")
    add("--parallel", type=int, default=1, metavar="N", help="runs at the same time (default: %(default)s)")
    add_report_option(parser)
    args = parser.parse_args(argv)
    check_positive(args, "parallel")
    check_options(args, "minutes", "more_minutes")
    args.texts = {name: Path(source) for name, source in named_texts(args.text).items()}
    return args


def run(args: argparse.Namespace) -> None:
    """Train all runs and print the tables."""
    from minigpt.benchmarks.choice import Study, choices_table, continuations_table, figures
    from minigpt.benchmarks.report import write_report

    study = Study(Path(args.output_dir), args.parallel, report=lambda line: print(line, flush=True))
    choices = study.choices(args.texts, args.minutes)
    continuations = study.continuations(choices, args.more_minutes) if args.more_minutes else []
    tables = choices_table(choices)
    if continuations:
        tables += f"\n\n{continuations_table(continuations)}"
    conditions = f"{args.parallel} runs at a time."
    write_report(figures(choices, continuations), tables, device="cpu", output=args.output, conditions=conditions)
