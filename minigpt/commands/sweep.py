"""Train a configuration with every combination of some options, and rank the results.

    minigpt sweep quickstart --option learning_rate=1e-3,2e-3,4e-3 --option hidden_size=128,192
    minigpt sweep mine.yaml --option muon_learning_rate=0.01,0.02,0.03,0.05 --halving 2 --parallel 2

Options of the trainer apply to all runs. Prints a table and writes it with a picture into the folder of the sweep. A
sweep that was interrupted continues where it was, and one with more values trains only the new ones.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from minigpt.utils.command_line import CommandParser, check_positive, unknown_option
from minigpt.utils.errors import UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt sweep`; those of the trainer end up in `words`, the swept ones in `values`."""
    parser = CommandParser(
        "minigpt sweep",
        __doc__,
        usage="%(prog)s CONFIG --option NAME=VALUE,VALUE,... [--option ...] [--name value ...]",
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help="what to train: a YAML file or the name of a preset")
    add(
        "--option",
        action="append",
        required=True,
        metavar="NAME=VALUE,...",
        help="an option of the trainer and its values; repeat it for a grid",
    )
    add("--output_dir", default="runs/sweep", metavar="DIR", help="folder of all runs (default: %(default)s)")
    add(
        "--halving",
        type=int,
        metavar="N",
        help="successive halving: short runs first, and one in N trains N times as long (default: all train fully)",
    )
    add(
        "--parallel",
        type=int,
        default=1,
        metavar="N",
        help="runs at the same time; they share the cores, or each has a GPU of its own (default: %(default)s)",
    )
    add("--profile", metavar="NAME", help="launch profile (default: one process for each run)")
    args, options = parser.parse_known_args(argv)
    check_positive(args, "parallel")
    if args.halving is not None and args.halving < 2:
        raise UserError(f"halving={args.halving} must be at least 2")
    args.words = [args.config, *options]
    args.values = _swept_options(args.option)
    return args


def run(args: argparse.Namespace) -> None:
    """Train all runs and print the table. Raises UserError if a combination of options is not valid."""
    from minigpt.experiments.sweep import PICTURE_FILE, sweep

    done = sweep(
        args.words,
        args.values,
        Path(args.output_dir),
        parallel=args.parallel,
        halving=args.halving,
        profile=args.profile,
        report=lambda line: print(line, flush=True),
    )
    print(f"\n{done.as_table()}\n\n{Path(args.output_dir, PICTURE_FILE)}")


def _swept_options(words: Sequence[str]) -> dict[str, list[str]]:
    """Option name → its values. Raises UserError for an unknown option and for missing or repeated values."""
    from minigpt.config.arguments import Arguments

    known = [name for name in Arguments.__dataclass_fields__ if name not in ("output_dir", "resume_from_checkpoint")]
    swept: dict[str, list[str]] = {}
    for word in words:
        name, _, values = word.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        if name not in known:
            raise UserError(f"option={word}: {unknown_option(f'--{name}', [f'--{other}' for other in known])}")
        if name in swept:
            raise UserError(f"option={word}: {name} is given twice; give all its values at once")
        swept[name] = [value.strip() for value in values.split(",")]
        if not all(swept[name]):
            raise UserError(f"option={word}: expected NAME=VALUE,VALUE,... without empty values")
        if len(set(swept[name])) < len(swept[name]):
            raise UserError(f"option={word}: a value is repeated")
    return swept
