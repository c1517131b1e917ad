"""Publish a run on the Hugging Face Hub, with a model card generated from the run.

    python hub_upload.py RUN_DIR USER/NAME [--private] [--space [--static]] [--gguf] [--onnx] [--dry_run] ...

The token is read from HF_TOKEN or from `hf auth login`. Run the same command again after an interruption or to publish
changes: files that are already on the Hub are not sent again.
"""

import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from minigpt.utils.errors import UserError, end_quietly_on_ctrl_c, file_errors_are_user_errors, one_line_errors

if __name__ == "__main__":
    end_quietly_on_ctrl_c("hub_upload.py")

from minigpt.commands.export_gguf import OUTTYPES
from minigpt.commands.export_onnx import DTYPES
from minigpt.hub.engine_files import engine_files
from minigpt.hub.secret_scan import refuse_secrets_on_command_line
from minigpt.hub.space import space_files, space_target
from minigpt.hub.upload import (
    UploadFile,
    UploadTarget,
    check_git_name,
    check_repo_id,
    files_not_uploaded,
    files_to_upload,
    publish,
)
from minigpt.utils.command_line import CommandParser
from minigpt.utils.formatting import format_bytes


def main(argv: list[str]) -> None:
    """Publish a run, or with --dry_run list what would be published. Raises UserError on bad input or a refusal."""
    refuse_secrets_on_command_line(argv)
    args = parse(argv)
    space_id = args.repo_id if args.space is True else args.space
    for repo_id in filter(None, (args.repo_id, space_id)):
        check_repo_id(repo_id)
    for option in ("revision", "tag"):
        if (name := getattr(args, option)) is not None:
            check_git_name(option, name)
    if args.static and space_id is None:
        raise UserError("--static is a kind of Space; add --space")
    if not args.run_dir.is_dir():
        raise UserError(f"{args.run_dir} is not a folder; give the folder of a run")
    model = UploadTarget(
        args.repo_id,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        tag=args.tag,
        commit_message=args.commit_message,
        license=args.license,
    )
    with tempfile.TemporaryDirectory(prefix="minigpt-") as folder:
        exports = []
        if args.gguf or args.onnx:
            exports = engine_files(model, args.run_dir, Path(folder), args.gguf, args.onnx)
        model_files = files_to_upload(model, args.run_dir, engine_files=exports)
        uploads = [(model, model_files)]
        if space_id is not None:
            space = space_target(model, space_id, "static" if args.static else "gradio")
            uploads.append((space, space_files(model, space, args.run_dir)))
        if args.dry_run:
            for target, files in uploads:
                print_files(target, files)
            print(f"not uploaded: {', '.join(files_not_uploaded(args.run_dir, model_files)) or 'nothing'}")
            return
        for target, files in uploads:
            print(publish(target, files), flush=True)


def print_files(target: UploadTarget, files: list[UploadFile]) -> None:
    """Print what an upload would send: the size and name of each file, and the total."""
    for file in files:
        print(f"{format_bytes(file.size):>12}  {file.name}")
    total = format_bytes(sum(file.size for file in files))
    print(f"{total:>12}  in {len(files)} files would be uploaded to {target.description}")


def parse(argv: list[str]) -> Namespace:
    """Parse the command line. Options have the names that `huggingface_hub` uses."""
    parser = CommandParser("hub_upload.py", __doc__)
    add = parser.add_argument
    add("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run, or one of its checkpoints")
    add("repo_id", metavar="USER/NAME", help="repository of a user or an organization")
    add("--private", action="store_true", help="if the repository is new, make it private")
    add("--revision", metavar="BRANCH", help="branch to commit to; it is created if needed (default: main)")
    add("--create_pr", action="store_true", help="open a pull request instead of committing to the branch")
    add("--tag", metavar="NAME", help="tag the commit with this name")
    add(
        "--space",
        nargs="?",
        const=True,
        metavar="USER/NAME",
        help="also publish a demo of the model as a Gradio Space (default name: that of the model)",
    )
    add("--static", action="store_true", help="make the Space a page that runs the model in the visitor's browser")
    add(
        "--gguf",
        nargs="*",
        choices=OUTTYPES,
        metavar="TYPE",
        help=f"also upload GGUF files for llama.cpp and Ollama: {', '.join(OUTTYPES)} (without a type: f16)",
    )
    add(
        "--onnx",
        nargs="*",
        choices=DTYPES,
        metavar="TYPE",
        help=f"also upload ONNX files for transformers.js: {', '.join(DTYPES)} (without a type: fp32 int8)",
    )
    add("--commit_message", metavar="TEXT", default=UploadTarget.commit_message, help="(default: %(default)s)")
    add(
        "--license",
        metavar="NAME",
        default=UploadTarget.license,
        help="license of code and weights (default: %(default)s)",
    )
    add("--dry_run", action="store_true", help="list the files and their sizes; nothing is sent")
    args = parser.parse_args(argv)
    args.gguf = ["f16"] if args.gguf == [] else args.gguf or []
    args.onnx = ["fp32", "int8"] if args.onnx == [] else args.onnx or []
    return args


if __name__ == "__main__":
    with one_line_errors("hub_upload.py"), file_errors_are_user_errors():
        main(sys.argv[1:])
