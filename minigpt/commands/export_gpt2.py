"""Export a model as a stock GPT-2 folder."""

import argparse
from collections.abc import Sequence

from minigpt.utils.errors import CommandParser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt export-gpt2`."""
    parser = CommandParser("minigpt export gpt2", __doc__)
    parser.add_argument("source", metavar="SRC", help="a MiniGPT folder (a run, a checkpoint) or Hub name")
    parser.add_argument("destination", metavar="DST", help="the folder to write; new or empty")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """`minigpt export-gpt2`. Raises UserError with one clear line on bad input."""
    from transformers.utils import logging

    from minigpt.export.gpt2 import export_gpt2

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for note in export_gpt2(args.source, args.destination):
        print(f"note: {note}")
    print(f"{args.destination}: a stock GPT-2; load it with GPT2LMHeadModel.from_pretrained")
