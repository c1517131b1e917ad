"""Export a model to ONNX, for ONNX Runtime and transformers.js."""

import argparse
from collections.abc import Sequence

from minigpt.utils.command_line import CommandParser

DTYPES = ("fp32", "fp16", "int8", "q4")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt export onnx`."""
    parser = CommandParser("minigpt export onnx", __doc__)
    parser.add_argument("source", metavar="SRC", help="MiniGPT folder (a run or a checkpoint) or Hub name")
    parser.add_argument("destination", metavar="DST", help="folder to write; it must be new or empty")
    parser.add_argument(
        "--dtype", nargs="+", default=["fp32"], choices=DTYPES, help="one file for each (default: fp32)"
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Run `minigpt export onnx`. Raises UserError on bad input."""
    from minigpt.export.onnx import FILE_NAMES, export_onnx

    for note in export_onnx(args.source, args.destination, args.dtype):
        print(f"note: {note}")
    files = ", ".join(f"{FILE_NAMES[dtype]}.onnx" for dtype in args.dtype)
    print(f"{args.destination}/onnx has {files} for ONNX Runtime and transformers.js")
