"""Compare two configurations fairly, and stop when the difference is settled.

    minigpt compare A.yaml B.yaml
    minigpt compare quickstart mine.yaml --smallest_difference 0.005 --max_steps 200

Trains pairs of runs: both have the same seed, and so the same data order, and they take turns in going first. After
each pair, a sequential t-test decides whether to go on. Its intervals hold at all looks together: if A and B are
equally good, they claim a difference with a probability of at most 5 %, however often one looks. Options of the
trainer apply to both configurations. A comparison that was interrupted continues where it was.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from minigpt.utils.command_line import CommandParser, check_positive
from minigpt.utils.errors import UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt compare`; those of the trainer end up in `options`."""
    parser = CommandParser(
        "minigpt compare", __doc__, usage="%(prog)s A.yaml B.yaml [--option value ...] [--max_pairs N] ..."
    )
    add = parser.add_argument
    add("a", metavar="A.yaml", help="a YAML file or the name of a preset")
    add("b", metavar="B.yaml", help="another one")
    add("--output_dir", default="runs/compare", metavar="DIR", help="folder of all runs (default: %(default)s)")
    add("--max_pairs", type=int, default=20, metavar="N", help="give up after N pairs (default: %(default)s)")
    add(
        "--smallest_difference",
        type=float,
        default=0.005,
        metavar="X",
        help="also stop when the losses cannot differ by this much (default: %(default)s nats per token)",
    )
    add("--seed", type=int, default=1337, metavar="N", help="seed of the first pair (default: %(default)s)")
    add("--profile", metavar="NAME", help="launch profile (default: one process)")
    args, options = parser.parse_known_args(argv)
    check_positive(args, "max_pairs")
    if not args.smallest_difference > 0:
        raise UserError(f"smallest_difference={args.smallest_difference} must be above 0")
    args.options = options
    return args


def run(args: argparse.Namespace) -> None:
    """Train pairs and print the table and the verdict. Raises UserError if a configuration is not valid."""
    from minigpt.experiments.compare import compare

    comparison = compare(
        [args.a, *args.options],
        [args.b, *args.options],
        Path(args.output_dir),
        seed=args.seed,
        max_pairs=args.max_pairs,
        smallest_difference=args.smallest_difference,
        profile=args.profile,
        report=lambda line: print(line, flush=True),
    )
    print(f"\n{comparison.as_table()}")
