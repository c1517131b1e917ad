"""Verify that a run resumes exactly.

    minigpt verify-resume CONFIG [--steps 20] [--stop_after 10] [--config_file PROFILE.yaml] [any training option]

Trains `steps` steps without interruption, then resumes from the checkpoint after `stop_after` in a new process, and
compares every loss, gradient norm, weight and optimizer moment, bit for bit. Exit code 0: equal; 1: not equal, and it
says where the two first differ.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from minigpt.utils.errors import CommandParser, UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser("minigpt verify-resume", __doc__)
    parser.add_argument("config", metavar="CONFIG", help="what to train: a YAML file or the name of a preset")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="length of the runs (default: %(default)s)")
    parser.add_argument("--stop_after", type=int, metavar="K", help="the step to resume from (default: half of them)")
    parser.add_argument("--config_file", metavar="FILE", help="launch profile (default: one process)")
    args, args.options = parser.parse_known_args(argv)
    if args.stop_after is None:
        args.stop_after = args.steps // 2
    if not 0 < args.stop_after < args.steps:
        raise UserError(f"stop_after={args.stop_after} must be above 0 and below steps={args.steps}")
    return args


def run(args: argparse.Namespace) -> None:
    from minigpt.training.verify_resume import differences, overrides, train

    with tempfile.TemporaryDirectory(prefix="verify-resume-") as folder:
        straight, resumed = Path(folder, "straight"), Path(folder, "resumed")
        words = [args.config, *args.options, *overrides(args.config, args.options, args.steps, args.stop_after)]
        print(f"training {args.steps} steps without interruption", flush=True)
        train(args.config_file, [*words, "--output_dir", str(straight)])
        resumed.mkdir()
        shutil.copytree(straight / f"checkpoint-{args.stop_after}", resumed / f"checkpoint-{args.stop_after}")
        print(f"resuming from step {args.stop_after}", flush=True)
        train(args.config_file, [*words, "--output_dir", str(resumed), "--resume_from_checkpoint", "latest"])
        difference = next(differences(straight, resumed, args.stop_after, args.steps), None)
    if difference is not None:
        print(f"NOT equal: {difference}")
        sys.exit(1)
    print(f"equal, bit for bit: losses, gradient norms, weights and moments after step {args.steps}")
