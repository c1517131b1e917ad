"""The output folder of a run: checks before anything is written."""

import shutil

from minigpt.config.arguments import Arguments
from minigpt.training.checkpoint import SMALL_FILES_BYTES
from minigpt.utils.errors import UserError
from minigpt.utils.files import lack_of_room, write_atomically
from minigpt.utils.run_files import ARGUMENTS_FILE, METRICS_FILE, find_checkpoints


def check_output_dir(args: Arguments) -> None:
    """Raises UserError if output_dir holds anything that this run would mix with."""
    folder = args.run_dir
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir={folder} is a file; give a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    is_run = (folder / ARGUMENTS_FILE).is_file() or (folder / METRICS_FILE).is_file() or find_checkpoints(folder)
    if not is_run:
        raise UserError(f"output_dir={folder} is not empty and holds no run of MiniGPT; give another folder")
    if not args.overwrite_output_dir and not args.resume_from_checkpoint:
        raise UserError(
            f"output_dir={folder} already holds a run; resume it with --resume_from_checkpoint latest, "
            "delete it with --overwrite_output_dir, or give another folder"
        )


def clear_output_dir(args: Arguments) -> None:
    """Create output_dir, emptied if `overwrite_output_dir` is set, and write the options of this run into it."""
    if args.overwrite_output_dir:
        shutil.rmtree(args.run_dir, ignore_errors=True)
    args.run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(args.run_dir / ARGUMENTS_FILE, args.as_yaml())


def check_room(args: Arguments, parameters: int) -> None:
    """Raises UserError if the disk lacks room for a checkpoint and the final model of `parameters` parameters."""
    folder = next(path for path in (args.run_dir.absolute(), *args.run_dir.absolute().parents) if path.is_dir())
    weights_bytes = 4 * parameters  # float32; a checkpoint holds them and at most two moments, the final model again
    if problem := lack_of_room(folder, 4 * weights_bytes + 2 * SMALL_FILES_BYTES):
        raise UserError(f"{problem} for one checkpoint and the final model; make room, or give another output_dir")
