"""Describe token shards: counts, document lengths, duplicates, unusual characters, and sample documents."""

import argparse
from collections.abc import Sequence

from minigpt.utils.command_line import CommandParser
from minigpt.utils.errors import UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt data inspect`."""
    parser = CommandParser("minigpt data inspect", __doc__)
    parser.add_argument("folder", metavar="DIR", help="folder of token shards")
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="documents shown per split (default: 3)")
    parser.add_argument("--tokenizer", help="tokenizer folder or Hub name, if the shards have none")
    args = parser.parse_args(argv)
    if args.samples < 0:
        raise UserError(f"samples={args.samples} must be at least 0")
    return args


def run(args: argparse.Namespace) -> None:
    """Print the description. Raises UserError if the folder or the tokenizer cannot be read."""
    from minigpt.data.inspect import describe
    from minigpt.data.shards import open_shards
    from minigpt.data.tokenizer import load_tokenizer

    shards = open_shards(args.folder)
    source = args.tokenizer or shards.tokenizer_dir
    print(describe(shards, load_tokenizer(source) if source else None, args.samples))
