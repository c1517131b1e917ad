"""The output folder of a run: checks before anything is written."""

import shutil

from minigpt.config.arguments import Arguments
from minigpt.training.checkpoint import SMALL_FILES_BYTES
from minigpt.utils.errors import UserError
from minigpt.utils.files import lack_of_room
from minigpt.utils.run_files import ARGUMENTS_FILE, METRICS_FILE, find_checkpoints


def check_output_dir(args: Arguments) -> None:
    """Raises UserError when output_dir holds something that this run would mix with."""
    folder = args.run_dir
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir={folder} is a file; give a folder")
    if not folder.exists() or not any(folder.iterdir()) or args.resume_from_checkpoint:
        return
    is_run = (folder / ARGUMENTS_FILE).is_file() or (folder / METRICS_FILE).is_file() or find_checkpoints(folder)
    if not is_run:
        raise UserError(f"output_dir={folder} is in use and holds no run of MiniGPT; give another folder")
    if not args.overwrite_output_dir:
        raise UserError(
            f"output_dir={folder} holds a run already; go on with --resume_from_checkpoint latest, "
            "delete it with --overwrite_output_dir, or give another folder"
        )


def clear_output_dir(args: Arguments) -> None:
    """Make output_dir ready: empty when `overwrite_output_dir` says so, and with this run's options in it."""
    if args.overwrite_output_dir:
        shutil.rmtree(args.run_dir, ignore_errors=True)
    args.run_dir.mkdir(parents=True, exist_ok=True)
    (args.run_dir / ARGUMENTS_FILE).write_text(args.as_yaml(), encoding="utf-8")


def check_room(args: Arguments, parameters: int) -> None:
    """Raises UserError when the disk has no room for a checkpoint and the final model of `parameters` numbers."""
    folder = next(path for path in (args.run_dir.absolute(), *args.run_dir.absolute().parents) if path.is_dir())
    numbers = 4 * parameters  # float32: weights and at most two moments, then the weights once more
    if problem := lack_of_room(folder, 4 * numbers + 2 * SMALL_FILES_BYTES):
        raise UserError(f"{problem} for one checkpoint and the final model; make room, or give another output_dir")
