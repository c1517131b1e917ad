"""Export a MiniGPT as a stock GPT-2 folder, which software for GPT-2 loads without remote code."""

import argparse
from collections.abc import Sequence

from minigpt.utils.command_line import CommandParser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt export gpt2`."""
    parser = CommandParser("minigpt export gpt2", __doc__)
    parser.add_argument("source", metavar="SRC", help="MiniGPT folder (a run or a checkpoint) or Hub name")
    parser.add_argument("destination", metavar="DST", help="folder to write; it must be new or empty")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Run `minigpt export gpt2`. Raises UserError on bad input."""
    from transformers.utils import logging

    from minigpt.export.gpt2 import export_gpt2

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for note in export_gpt2(args.source, args.destination):
        print(f"note: {note}")
    print(f"{args.destination} is a stock GPT-2; load it with GPT2LMHeadModel.from_pretrained")
