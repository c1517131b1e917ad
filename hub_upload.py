"""Publish a run on the Hugging Face Hub, with a card written from it.

    python hub_upload.py RUN_DIR USER/NAME [--private] [--space] [--dry_run] ...

The token comes from HF_TOKEN or `hf auth login`. Run the same command again after an interruption, or to bring what
has changed; what is there already is not sent again.
"""

import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from huggingface_hub.utils import validate_repo_id

from minigpt.hub.secret_scan import refuse_secret_words
from minigpt.hub.space import collect_space, space_of
from minigpt.hub.upload import Destination, collect, described, left_out, publish
from minigpt.utils.errors import OneLineParser, UserError, one_line_errors
from minigpt.utils.formatting import format_bytes


def main(argv: list[str]) -> None:
    """Publish, or with --dry_run tell what would go. Raises UserError in one line for whatever stands in the way."""
    refuse_secret_words(argv)
    args = parse(argv)
    space_id = args.repo_id if args.space == "" else args.space
    for name in filter(None, (args.repo_id, space_id)):
        validate_repo_id(name)
        if "/" not in name:
            raise UserError(f"{name}: whose repository? Give USER/{name} or ORGANISATION/{name}")
    if not args.run_dir.is_dir():
        raise UserError(f"{args.run_dir}: no such folder; give the folder of a run")
    options = {name: value for name, value in vars(args).items() if name not in ("run_dir", "dry_run", "space")}
    model = Destination(**options)
    items = collect(model, args.run_dir)
    uploads = [(model, items)]
    if space_id is not None:
        space = space_of(model, space_id)
        uploads.append((space, collect_space(model, space, args.run_dir)))
    for destination, files in uploads:
        if not args.dry_run:
            print(publish(destination, files), flush=True)
            continue
        for item in files:
            print(f"{format_bytes(item.size):>12}  {item.name}")
        size = format_bytes(sum(item.size for item in files))
        print(f"{size:>12}  in {len(files)} files would go to {described(destination)}")
    if args.dry_run:
        print(f"stays here: {', '.join(left_out(args.run_dir, items)) or 'nothing'}")


def parse(argv: list[str]) -> Namespace:
    """The command line. Options carry the names that `huggingface_hub` gives them."""
    parser = OneLineParser(
        "hub_upload.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run, or one of its checkpoints")
    parser.add_argument("repo_id", metavar="USER/NAME", help="repository, of a user or an organisation")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to, created if need be (default: main)")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--tag", help="tag the commit")
    parser.add_argument(
        "--space",
        nargs="?",
        const="",
        metavar="USER/NAME",
        help="and a demo of it, as a Gradio Space (default: same name)",
    )
    parser.add_argument("--commit_message", default=Destination.commit_message, help="(default: %(default)s)")
    parser.add_argument("--license", default=Destination.license, help="licence of the weights (default: %(default)s)")
    parser.add_argument("--dry_run", action="store_true", help="list what would go and how large; nothing is sent")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with one_line_errors("hub_upload.py"):
        main(sys.argv[1:])
