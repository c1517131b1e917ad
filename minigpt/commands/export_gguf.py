"""Export a model as a GGUF file for llama.cpp, Ollama, LM Studio and other programs that are built on llama.cpp."""

import argparse
from collections.abc import Sequence

from minigpt.utils.command_line import CommandParser

OUTTYPES = ("f32", "f16", "bf16", "q8_0")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt export gguf`."""
    parser = CommandParser("minigpt export gguf", __doc__)
    parser.add_argument("source", metavar="SRC", help="MiniGPT folder (a run or a checkpoint) or Hub name")
    parser.add_argument("destination", metavar="DST", help="new file that ends in .gguf, or a folder to write it to")
    parser.add_argument("--outtype", default="f16", choices=OUTTYPES, help="of the matrices (default: %(default)s)")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Run `minigpt export gguf`. Raises UserError on bad input."""
    from minigpt.export.gguf import export_gguf

    files = export_gguf(args.source, args.destination, args.outtype)
    for note in files.notes:
        print(f"note: {note}")
    print(f"{files.model} runs in llama.cpp: llama-cli -m {files.model}")
    print(f"for Ollama: ollama create NAME -f {files.modelfile}")
