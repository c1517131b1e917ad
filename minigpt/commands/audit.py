"""Say whether a run is what its folder says.

    minigpt audit RUN [--share 0.05] [--seed N] [--option value ...]

Compares the hashes of checkpoints, log, options and data with each other, and trains random stretches between the
checkpoints again: losses, gradient norms and weights must come out as they are in the folder. Training options say
where the data is now, such as --data or --train_file. Exit code 0: everything agrees; 1: something does not.
"""

import argparse
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from minigpt.utils.command_line import CommandParser
from minigpt.utils.errors import UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt audit`; training options end up in `options`."""
    parser = CommandParser("minigpt audit", __doc__)
    add = parser.add_argument
    add("run_dir", type=Path, metavar="RUN", help="the folder of a run, with its checkpoints")
    add("--share", type=float, default=0.05, metavar="X", help="share of the steps to train again (default: 0.05)")
    add("--seed", type=int, metavar="N", help="which steps (default: other ones each time)")
    add("--profile", metavar="PROFILE", help="launch profile to train with (default: one that fits)")
    add(
        "--num_processes",
        type=int,
        metavar="N",
        help="processes to train with (default: one; those of the run if it has dropout)",
    )
    args, options = parser.parse_known_args(argv)
    args.options = options
    if not 0 < args.share <= 1:
        raise UserError(f"share={args.share} must be above 0 and at most 1")
    if args.num_processes is not None and args.num_processes < 1:
        raise UserError(f"num_processes={args.num_processes} must be at least 1")
    if args.seed is None:
        args.seed = secrets.randbelow(2**32)
    return args


def run(args: argparse.Namespace) -> None:
    """Print each check. Raises UserError if the folder holds no run that could be trained again."""
    from minigpt.training.audit import Audit

    audit = Audit(
        args.run_dir,
        args.options,
        share=args.share,
        seed=args.seed,
        profile=args.profile,
        processes=args.num_processes,
    )
    is_sound = True
    for check in audit.checks():
        is_sound &= not check.problem
        print(f"{'FAILED' if check.problem else 'ok':<8}{check.subject}", flush=True)
        if check.problem:
            print(f"        {check.problem}", flush=True)
    trained = f"{audit.steps_trained:,} of {audit.steps:,} steps trained again ({audit.cost:.1%}), seed {args.seed}"
    print(f"{'sound' if is_sound else 'NOT sound'}: {trained}")
    sys.exit(0 if is_sound else 1)
