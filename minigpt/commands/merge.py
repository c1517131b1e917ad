"""Merge a LoRA adapter into its base model, and write a whole model that needs neither the base nor peft."""

import argparse
from collections.abc import Sequence

from minigpt.utils.command_line import CommandParser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt merge`."""
    parser = CommandParser("minigpt merge", __doc__)
    parser.add_argument("adapter", metavar="ADAPTER", help="folder (a run or a checkpoint) or Hub name of an adapter")
    parser.add_argument("destination", metavar="DIR", help="folder to write; it must be new or empty")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Run `minigpt merge`. Raises UserError on bad input."""
    from transformers.utils import logging

    from minigpt.export.merge import export_merged

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for note in export_merged(args.adapter, args.destination):
        print(f"note: {note}")
    print(f"{args.destination} is a whole model; continue a text with minigpt generate --model {args.destination}")
