"""Serve a page to explore a model: a chat, its text, next tokens and attention."""

import argparse
import socket
from collections.abc import Sequence
from pathlib import Path

from minigpt.utils.command_line import CommandParser
from minigpt.utils.errors import UserError


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
    add("--share", action="store_true", help="also open a public address at gradio.live, for a week")
    args = parser.parse_args(argv)
    if args.port is not None and not 1 <= args.port <= 65535:
        raise UserError(f"port={args.port} must be from 1 to 65535")
    return args


def run(args: argparse.Namespace) -> None:
    """`minigpt playground`: serve the page until Ctrl-C.

    Raises UserError if Gradio is not installed, the address cannot be used, or the model cannot be loaded.
    """
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
    page = build_page(player, folder.resolve().name if folder.is_dir() else args.model, prompts)
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
