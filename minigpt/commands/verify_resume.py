"""Verify that a run resumes exactly.

    minigpt verify-resume CONFIG [--steps 20] [--stop_after 10] [--config_file PROFILE] [--option value ...]

Trains `steps` steps without interruption, then resumes from the checkpoint after step `stop_after` in a new process,
and compares every loss, gradient norm, weight and optimizer moment, bit for bit. The options are those of
`minigpt train`. Exit code 0: equal; 1: not equal, and the first difference is printed.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from minigpt.utils.command_line import CommandParser
from minigpt.utils.errors import UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt verify-resume`; training options end up in `options`."""
    parser = CommandParser("minigpt verify-resume", __doc__)
    parser.add_argument("config", metavar="CONFIG", help="what to train: a YAML file or the name of a preset")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="length of the runs (default: %(default)s)")
    parser.add_argument("--stop_after", type=int, metavar="K", help="step to resume from (default: half of the steps)")
    parser.add_argument("--config_file", metavar="PROFILE", help="launch profile: name or file (default: one process)")
    args, options = parser.parse_known_args(argv)
    args.options = options
    if args.stop_after is None:
        args.stop_after = args.steps // 2
    if not 0 < args.stop_after < args.steps:
        raise UserError(f"stop_after={args.stop_after} must be above 0 and below steps={args.steps}")
    return args


def run(args: argparse.Namespace) -> None:
    """Train twice and compare. Raises UserError if the trainer refuses the options."""
    from minigpt.training.verify_resume import differences, run_trainer, short_run_options

    with tempfile.TemporaryDirectory(prefix="verify-resume-") as folder:
        uninterrupted, resumed = Path(folder, "uninterrupted"), Path(folder, "resumed")
        checkpoint = f"checkpoint-{args.stop_after}"
        short_run = short_run_options(args.config, args.options, args.steps, args.stop_after)
        options = [args.config, *args.options, *short_run]
        print(f"training {args.steps} steps without interruption", flush=True)
        run_trainer(args.config_file, [*options, "--output_dir", str(uninterrupted)])
        shutil.copytree(uninterrupted / checkpoint, resumed / checkpoint)
        print(f"resuming from step {args.stop_after}", flush=True)
        run_trainer(args.config_file, [*options, "--output_dir", str(resumed), "--resume_from_checkpoint", "latest"])
        difference = next(differences(uninterrupted, resumed, args.stop_after, args.steps), None)
    if difference is not None:
        print(f"NOT equal: {difference}")
        if "--full_determinism" not in args.options:
            print("On a GPU, some kernels add in another order each time; --full_determinism avoids them.")
        sys.exit(1)
    print(f"equal, bit for bit: losses, gradient norms, weights and moments after step {args.steps}")
