"""Serve a page to explore a model: a chat, its text, next tokens and attention."""

import argparse
import errno
import socket
import tempfile
from collections.abc import Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt.utils.command_line import CommandParser
from minigpt.utils.errors import UserError

if TYPE_CHECKING:
    from minigpt.playground.copies import CopyMarker
    from minigpt.playground.player import Player

FIRST_PORT = 7860  # Gradio's


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt playground`."""
    parser = CommandParser("minigpt playground", __doc__)
    add = parser.add_argument
    add("--model", required=True, help="run folder, checkpoint, model folder or Hub name")
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 is open to other machines (default: %(default)s)",
    )
    add("--port", type=int, metavar="N", help="port to listen on (default: the first free one from 7860)")
    add("--browser", action="store_true", help="a page that runs the model in the browser; it needs no Gradio")
    add("--share", action="store_true", help="also open a public address at gradio.live, for a week")
    args = parser.parse_args(argv)
    if args.port is not None and not 1 <= args.port <= 65535:
        raise UserError(f"port={args.port} must be from 1 to 65535")
    if args.browser and args.share:
        raise UserError("--share is Gradio's; with --browser, publish the page: hub_upload.py --space --static")
    return args


def run(args: argparse.Namespace) -> None:
    """`minigpt playground`: serve the page until Ctrl-C.

    Raises UserError if Gradio is not installed, the address cannot be used, or the model cannot be loaded.
    """
    if args.browser:
        _serve_static_page(args)
        return
    try:
        import gradio
    except ImportError as error:
        raise UserError('the playground needs Gradio: pip install "minigpt-lm[playground]"') from error
    try:  # if the address is in use, Gradio would try other ports
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        socket.create_server((args.host, args.port or 0), family=family).close()
    except OSError as error:
        raise UserError(f"cannot listen on {args.host}, port {args.port or 'any'}: {error.strerror}") from error

    from transformers.utils import logging

    from minigpt.data.tokenizer import load_tokenizer
    from minigpt.hub.run_summary import read_run_summary
    from minigpt.modeling.loading import find_model, load_model
    from minigpt.modeling.packed_linear import pack_linears
    from minigpt.playground.page import CSS, build_page
    from minigpt.playground.player import Player

    folder = Path(args.model).expanduser()
    prompts = read_run_summary(folder).options.get("sample_prompts") or [] if folder.is_dir() else []
    logging.set_verbosity_error()  # otherwise transformers warns about every long prompt
    source = find_model(args.model)
    player = Player(load_model(source), load_tokenizer(source, require_eos=False, require_fast=False))
    marker = _copy_marker(Path(source), player)
    page = build_page(player, folder.resolve().name if folder.is_dir() else args.model, prompts, marker)
    pack_linears(player.model)  # after the page has counted the parameters, which a packed model lacks
    page.queue()
    local_fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # no downloads
    _, local_url, public_url = page.launch(
        server_name=args.host,
        server_port=args.port,
        share=args.share,
        prevent_thread_lock=True,
        quiet=True,
        theme=gradio.themes.Default(primary_hue="blue", **local_fonts),
        css=CSS,
        footer_links=[],
    )
    print(f"playground: {local_url}{f' and {public_url}' if public_url else ''}     (Ctrl-C ends it)", flush=True)
    page.block_thread()


def _copy_marker(source: Path, player: "Player") -> "CopyMarker | str | None":
    """What marks copies of the training text of a run. A text says why it cannot; None if `source` is no run's."""
    from minigpt.playground.copies import CopyMarker
    from minigpt.utils.run_files import ARGUMENTS_FILE

    if not (source / ARGUMENTS_FILE).is_file() or player.tokenizer.eos_token_id is None:
        return None
    try:
        return CopyMarker(source, player.tokenizer)
    except UserError as error:
        return str(error)


def _serve_static_page(args: argparse.Namespace) -> None:
    """Serve the page of `minigpt export html` until Ctrl-C. Raises UserError as `run`."""
    with tempfile.TemporaryDirectory() as folder, _page_server(args.host, args.port, folder) as server:
        from minigpt.export.html import write_static_page

        write_static_page(args.model, folder)
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"playground: http://{host}:{server.server_port}/     (Ctrl-C ends it)", flush=True)
        server.serve_forever()


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Print no line for each request."""


def _page_server(host: str, port: int | None, folder: str) -> ThreadingHTTPServer:
    """A server of the files in `folder`, at the first free port from 7860 on if `port` is None."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    ports = range(FIRST_PORT, FIRST_PORT + 100) if port is None else [port]
    for candidate in ports:
        try:
            return Server((host, candidate), partial(_QuietHandler, directory=folder))
        except OSError as error:
            reason = error.strerror
            if error.errno != errno.EADDRINUSE:
                break
    raise UserError(f"cannot listen on {host}, port {port or f'{FIRST_PORT} and above'}: {reason}")
