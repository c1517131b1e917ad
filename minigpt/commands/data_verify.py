"""Verify token shards: read every byte and compare hashes, counts, ids and the tokenizer with the manifest."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from minigpt.utils.command_line import CommandParser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt data verify`."""
    parser = CommandParser("minigpt data verify", __doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of token shards with a manifest.json")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Print what was checked. Raises UserError if the shards differ from their manifest."""
    from minigpt.data.inspect import verify_folder

    print(verify_folder(args.folder))
