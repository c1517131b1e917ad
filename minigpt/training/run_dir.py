"""The output folder of a run: checked before anything is written, locked, and never emptied of what is not a run's."""

import fnmatch
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from minigpt.config.arguments import Arguments
from minigpt.training.optional_files import room_for_saving
from minigpt.utils.errors import UserError
from minigpt.utils.files import PARTIAL, delete, lack_of_room, new_parents, read_text, write_atomically
from minigpt.utils.lock import locked
from minigpt.utils.run_files import (
    ARGUMENTS_FILE,
    CARD_FILE,
    CHECKPOINT,
    CHECKSUMS_FILE,
    LOCK_FILE,
    METRICS_FILE,
    REPLACED_DIR,
    RUN_FILES,
    RUN_FOLDERS,
    SET_ASIDE,
    STATE_FILE,
    find_checkpoints,
    read_metrics,
)

INPUTS = (
    "model_name_or_path", "tokenizer", "data", "train_file", "validation_file", "dataset_name", "hellaswag_file",
    "resume_from_checkpoint",
)  # fmt: skip
SHARED_AFTER_S = 30  # a network file system shows new files to other hosts after some seconds


class OutputDir:
    """The folder of a run while the run has it.

    It is locked, so that a second trainer cannot write into it. With `overwrite_output_dir` the files of an earlier
    run are moved into `.replaced`. After the first step they are deleted; if that is never reached, they are moved
    back. Files that are not a run's stay where they are.
    """

    def __init__(self, args: Arguments) -> None:
        self.args, self.folder = args, args.run_dir
        self._stack = ExitStack()
        self._is_locked = self._replacing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        is_gone = self._is_locked and not self.folder.is_dir()
        if self._replacing and not is_gone:
            self._move_back()
        self._stack.__exit__(kind, error, traceback)
        if is_gone and isinstance(error, FileNotFoundError):
            raise UserError(
                f"output_dir={self.folder} was deleted while this run wrote into it; train again"
            ) from error

    def check(self) -> None:
        """Raises UserError if the folder holds anything that this run would mix with. Every rank may call this."""
        folder = self.folder
        if os.path.lexists(folder) and not folder.is_dir():
            raise UserError(f"output_dir={folder} is a file; give a folder")
        if not folder.exists() or not _entries(folder):
            return
        for path in folder.iterdir():
            if problem := _obstacle(path):
                raise UserError(f"output_dir={folder}: {problem}; move it away, or give another output_dir")
        if (folder / REPLACED_DIR).is_dir() and not self.args.overwrite_output_dir:
            raise UserError(
                f"output_dir={folder}: {REPLACED_DIR} holds the run that an interrupted start was replacing; give "
                "--overwrite_output_dir again, or move its files back"
            )
        is_run = (folder / ARGUMENTS_FILE).is_file() or (folder / METRICS_FILE).is_file() or find_checkpoints(folder)
        if not is_run and not (folder / REPLACED_DIR).is_dir():
            raise UserError(f"output_dir={folder} is not empty and holds no run of MiniGPT; give another folder")
        if not self.args.overwrite_output_dir and not self.args.resume_from_checkpoint:
            raise UserError(
                f"output_dir={folder} already holds a run; resume it with --resume_from_checkpoint latest, "
                "delete it with --overwrite_output_dir, or give another folder"
            )
        if self.args.overwrite_output_dir:
            self._check_inputs()
        elif (folder / METRICS_FILE).is_file():
            read_metrics(folder / METRICS_FILE)  # a damaged file is reported before anything changes

    def lock(self) -> None:
        """Lock the folder until the run ends. The main process calls this.

        The system releases the lock of a process that was killed. Raises UserError that names who holds it.
        """
        self._stack.enter_context(new_parents(self.folder))
        if not self.folder.exists():
            self.folder.mkdir()
            self._stack.push(self._remove_if_unused)
        self._stack.enter_context(locked(self.folder / LOCK_FILE, f"output_dir={self.folder}"))
        self._is_locked = True
        self.check()  # another run may have come and gone since the first check

    def start(self) -> None:
        """Move an earlier run aside if `overwrite_output_dir` is set, and write the options of this one."""
        if self.args.overwrite_output_dir:
            self._move_aside()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / ARGUMENTS_FILE, self.args.as_yaml())

    def check_shared(self, options: str) -> None:
        """Raises UserError if this process does not see the `options` that the main process has written."""
        path, deadline = self.folder / ARGUMENTS_FILE, time.monotonic() + SHARED_AFTER_S
        while not (path.is_file() and read_text(path) == options):
            if time.monotonic() > deadline:
                raise UserError(
                    f"output_dir={self.folder} on {socket.gethostname()} is not that of the main process; all hosts "
                    "save a sharded model, so give a folder that they share"
                )
            time.sleep(0.1)

    def discard_earlier_run(self) -> None:
        """Delete the run that this one replaces. To be called once a step has been made."""
        if self._replacing:
            self._replacing = False
            shutil.rmtree(self.folder / REPLACED_DIR)

    def _check_inputs(self) -> None:
        """Raises UserError if an input of this run is one of the files that would be replaced."""
        replaced = [path.resolve() for path in self._run_entries()]
        for name in INPUTS:
            values = getattr(self.args, name)
            for value in [values] if isinstance(values, str) else values or []:
                path = Path(value).expanduser().resolve()
                if path == self.folder.resolve() or any(path.is_relative_to(entry) for entry in replaced):
                    raise UserError(
                        f"{name}={value} is part of the run in output_dir={self.folder}, which overwrite_output_dir "
                        "would delete; give another output_dir"
                    )

    def _run_entries(self) -> Iterator[Path]:
        for path in _entries(self.folder):
            if _matches(path.name, (*RUN_FILES, *RUN_FOLDERS)) or _is_checkpoint_name(path.name):
                yield path

    def _move_aside(self) -> None:
        replaced = self.folder / REPLACED_DIR
        replaced.mkdir(parents=True, exist_ok=True)
        self._replacing = True
        for path in self._run_entries():
            if (replaced / path.name).exists():  # `path` is of a start that was interrupted before its first step
                delete(path)
            else:
                path.rename(replaced / path.name)

    def _move_back(self) -> None:
        for path in self._run_entries():
            delete(path)
        for path in (self.folder / REPLACED_DIR).iterdir():
            path.rename(self.folder / path.name)
        (self.folder / REPLACED_DIR).rmdir()

    def _remove_if_unused(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Remove a folder that this run has made if it failed before it wrote anything."""
        if kind is not None and self.folder.is_dir() and not _entries(self.folder):
            with suppress(OSError):
                (self.folder / LOCK_FILE).unlink(missing_ok=True)
                self.folder.rmdir()


def check_room(args: Arguments, parameters: int) -> None:
    """Raises UserError if the disk lacks room for a checkpoint and the final model of `parameters` parameters."""
    folder = next(path for path in (args.run_dir.absolute(), *args.run_dir.absolute().parents) if path.is_dir())
    if problem := lack_of_room(folder, room_for_saving(4 * parameters)):  # float32
        raise UserError(f"{problem} for one checkpoint and the final model; make room, or give another output_dir")


def _entries(folder: Path) -> list[Path]:
    """What is in the folder besides the files of the lock, and of a write that a kill has interrupted."""
    unfinished = {name + PARTIAL for name in RUN_FILES}
    return [path for path in folder.iterdir() if not path.name.startswith(LOCK_FILE) and path.name not in unfinished]


def _is_checkpoint_name(name: str) -> bool:
    return CHECKPOINT.fullmatch(name) is not None or SET_ASIDE.fullmatch(name) is not None


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _obstacle(path: Path) -> str | None:
    """A sentence about an entry of the run's folder that has the name of a run's file or folder but is none."""
    leads_nowhere = path.is_symlink() and not path.exists()
    if CHECKPOINT.fullmatch(path.name):
        is_checkpoint = (path / CHECKSUMS_FILE).is_file() or (path / STATE_FILE).is_file()
        if not is_checkpoint and (path.exists() or leads_nowhere):
            return f"{path.name} has the name of a checkpoint but is none"
    is_file_name = _matches(path.name, (*RUN_FILES, CARD_FILE, LOCK_FILE))
    if is_file_name and (path.is_dir() or leads_nowhere):
        return f"{path.name} is no file, but a run has a file of this name"
    is_folder_name = path.name in (REPLACED_DIR, *RUN_FOLDERS)
    if is_folder_name and (path.is_file() or leads_nowhere):
        return f"{path.name} is no folder, but a run has a folder of this name"
    return None
