"""Train many small models: how the loss depends on shape, vocabulary, length and learning rate.

    minigpt bench scaling --text code=stdlib.txt --text kjv=kjv.txt --text docs=python-docs --parallel 2

This is the study behind docs/recipes.md and `--train_minutes`; it fits the law to its runs. With nine texts it takes
hours on two cores. A study that was interrupted continues.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from minigpt.utils.command_line import CommandParser, check_positive

QUESTIONS = ("law", "vocabulary", "repetition", "muon_rate", "adamw_rate")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt bench scaling`; `texts` are the words that give each text to the trainer."""
    from minigpt.benchmarks.report import named_texts

    parser = CommandParser("minigpt bench scaling", __doc__)
    add = parser.add_argument
    add(
        "--text",
        action="append",
        required=True,
        metavar="NAME=FILE",
        help="a text, or NAME=python-docs; the first one gets the most runs, the last one, a small one, is repeated",
    )
    add("--output_dir", default="runs/scaling", metavar="DIR", help="folder of all runs (default: %(default)s)")
    add("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS), help="parts of the study (default: all)")
    add("--parallel", type=int, default=1, metavar="N", help="runs at the same time (default: %(default)s)")
    args = parser.parse_args(argv)
    check_positive(args, "parallel")
    args.texts = {
        name: ["--corpus", source] if source == "python-docs" else ["--train_file", source]
        for name, source in named_texts(args.text, ["python-docs"]).items()
    }
    return args


def run(args: argparse.Namespace) -> None:
    """Train all runs and say where the table is."""
    from minigpt.benchmarks.scaling import RUNS_FILE, fitted_law, rate_tables, run_study

    output_dir = Path(args.output_dir)
    rows = run_study(
        args.texts, output_dir, args.questions, args.parallel, report=lambda line: print(line, flush=True)
    )
    print(f"{len(rows)} runs: {output_dir / RUNS_FILE}")
    for table in rate_tables(rows):
        print(f"\n{table}\n")
    if {"law", "vocabulary", "repetition"} <= set(args.questions):
        print("\n".join(fitted_law(rows)))
