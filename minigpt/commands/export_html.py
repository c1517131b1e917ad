"""Export a model as a web page that runs it: one file, without a server or network, or a folder for a web server."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from minigpt.utils.command_line import CommandParser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt export html`."""
    parser = CommandParser("minigpt export html", __doc__)
    add = parser.add_argument
    add("source", metavar="SRC", help="MiniGPT folder (a run or a checkpoint) or Hub name")
    add(
        "destination",
        metavar="DST",
        help="PAGE.html: one file that holds the weights; otherwise a new or empty folder for a web server",
    )
    add(
        "--dtype",
        choices=("int8", "f32"),
        default="int8",
        help="int8: matrices in 8 bits, a quarter of the size; f32: the exact weights (default: %(default)s)",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Run `minigpt export html`. Raises UserError on bad input."""
    from minigpt.export.html import write_page, write_static_page
    from minigpt.utils.formatting import format_bytes

    destination = Path(args.destination)
    if destination.suffix.lower() in (".html", ".htm"):
        write_page(args.source, destination, args.dtype)
        print(f"{destination} ({format_bytes(destination.stat().st_size)}) runs the model; open it in a browser")
        return
    size = sum(path.stat().st_size for path in write_static_page(args.source, destination, args.dtype))
    print(
        f"{destination} ({format_bytes(size)}) runs the model behind any web server; here: "
        f"python -m http.server --bind 127.0.0.1 --directory {destination}"
    )
