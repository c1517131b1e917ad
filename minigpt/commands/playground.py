"""Serve a page to explore a model: its text, next tokens and attention."""

import argparse
import socket
from collections.abc import Sequence
from pathlib import Path

from minigpt.utils.errors import CommandParser, UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `minigpt playground`."""
    parser = CommandParser("minigpt playground", __doc__)
    add = parser.add_argument
    add("--model", required=True, help="run folder, checkpoint, or any model folder or Hub name")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets others in (default: %(default)s)")
    add("--port", type=int, metavar="N", help="port to listen at (default: the first free one from 7860)")
    add("--share", action="store_true", help="also open a public address at gradio.live, for a week")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """`minigpt playground`: serve the page until Ctrl-C. Raises UserError in one line on bad input."""
    from minigpt.hub.run_summary import read_run_summary
    from minigpt.modeling.loading import load_model
    from minigpt.playground.page import CSS, Player, build_page
    from minigpt.playground.views import BARS_CSS

    try:
        import gradio
    except ImportError as error:
        raise UserError("the playground needs Gradio: pip install minigpt[playground]") from error
    from minigpt.modeling.packed_linear import pack_linears

    if args.port is not None and not 1 <= args.port <= 65535:
        raise UserError(f"port={args.port} must be from 1 to 65535")
    try:  # Gradio would try one port after the other
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        socket.create_server((args.host, args.port or 0), family=family).close()
    except OSError as error:
        raise UserError(f"cannot listen at {args.host}, port {args.port or 'any'}: {error.strerror}") from error
    folder = Path(args.model).expanduser()
    prompts = read_run_summary(folder).options.get("sample_prompts") or [] if folder.is_dir() else []
    player = Player(*load_model(args.model, None, "auto", False))
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none from elsewhere
    page = build_page(player, folder.resolve().name if folder.is_dir() else args.model, prompts)
    pack_linears(player.model)
    page.queue()
    _, local, public = page.launch(
        server_name=args.host,
        server_port=args.port,
        share=args.share,
        prevent_thread_lock=True,
        quiet=True,
        theme=gradio.themes.Default(primary_hue="blue", **fonts),
        css=CSS + BARS_CSS,
        footer_links=[],
    )
    print(f"playground: {local}{f' and {public}' if public else ''}     (Ctrl-C ends it)", flush=True)
    page.block_thread()
