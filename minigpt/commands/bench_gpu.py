"""Check and measure on one NVIDIA GPU what no other machine can show, in less than eight minutes.

Trains in every precision with every optimizer, checkpoints, resumes, counts where the host waits for the device,
and measures loss kernels, memory, training beside nanoGPT and transformers' Trainer, and decoding. Each step runs in a
process of its own; a step that fails is reported, and the next one runs. Needs no data and no network.

The exit code is 1 if a step failed or a check did not hold.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from minigpt.utils.command_line import CommandParser
from minigpt.utils.errors import UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt bench gpu`."""
    from minigpt.benchmarks.gpu import STEPS
    from minigpt.benchmarks.report import add_nanogpt_option, check_nanogpt, check_options

    parser = CommandParser("minigpt bench gpu", __doc__)
    add = parser.add_argument
    add_nanogpt_option(parser)
    add("--output", metavar="FILE", help="also write FILE.jsonl, a line per figure as it is measured, and FILE.md")
    add("--dry_run", action="store_true", help="the same at a tiny size on the CPU, without what needs CUDA")
    add("--only", nargs="+", metavar="STEP", help="run only the steps whose names begin with one of these words")
    args = parser.parse_args(argv)
    check_options(args)
    if args.nanogpt is not None:
        check_nanogpt(args.nanogpt, "give a checkout of nanoGPT")
    for word in args.only or []:
        if not any(step.name.startswith(word) for step in STEPS):
            raise UserError(f"only={word}: no such step; choose from {', '.join(step.name for step in STEPS)}")
    return args


def run(args: argparse.Namespace) -> None:
    """Run the steps and print the table. Raises UserError without a GPU, unless it is a dry run."""
    import torch

    from minigpt.benchmarks.gpu import DRY_RUN, GPU, MACHINE, STEPS, failures, markdown, run_all, summary

    if not args.dry_run and not torch.cuda.is_available():
        raise UserError("no NVIDIA GPU can be used here; --dry_run runs the steps at a tiny size on the CPU")
    words = [MACHINE, *args.only] if args.only else [""]
    steps = [step for step in STEPS if step.name.startswith(tuple(words))]
    with tempfile.TemporaryDirectory() as folder:
        report = f"{args.output}.jsonl" if args.output else str(Path(folder, "figures.jsonl"))
        settings = replace(DRY_RUN if args.dry_run else GPU, nanogpt=args.nanogpt, figures=report)
        figures = run_all(steps, settings, Path(folder))
    text = f"{summary(figures)}\n\n{markdown(figures)}"
    print(f"\n{text}")
    if args.output:
        Path(f"{args.output}.md").write_text(text + "\n", encoding="utf-8")
    if failures(figures):
        sys.exit(1)
