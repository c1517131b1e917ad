"""Files and folders that appear whole or not at all, their hashes, and the room they need."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from minigpt.utils.errors import UserError

PARTIAL = ".partial"  # ends the name of a file that is being written
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file as hexadecimal digits, read a few megabytes at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that is either the old one or the whole new one, whenever the process or the machine stops."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write does not name its file
        with suppress(OSError):
            partial.unlink()
        raise
    fsync(path.parent)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file. If the write fails, as on a full disk, the file ends with its last whole line."""
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        rest = f"{line}\n".encode()
        try:
            while rest:  # a disk that becomes full takes a part of the line first
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(end)
            raise


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a UTF-8 file that the user has named; `errors` as in `open`.

    Raises UserError if it is no regular file (opening a pipe could wait forever), cannot be read or is not UTF-8;
    FileNotFoundError if there is none.
    """
    try:
        return read_bytes(path).decode(errors=errors).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start} cannot be read") from error


def read_bytes(path: Path) -> bytes:
    """The content of a file that the user has named. Raises UserError and FileNotFoundError as `read_text`."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file")
    try:
        return path.read_bytes()
    except OSError as error:
        if error.filename is None:  # it was opened, but reading failed
            raise UserError(f"{path}: {error.strerror}") from error
        raise


def read_json(path: Path, content: str, keys: Iterable[str] = ()) -> dict[str, Any]:
    """The object in a JSON file, which has at least `keys`; `content` says in errors what the file should hold.

    Raises UserError if there is no such file, or it holds anything else.
    """
    try:
        text = read_text(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: no such file; it should be {content}") from error
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, a number of thousands of digits, nested without end
        raise UserError(f"{path}: not {content}: {error}") from error
    if not isinstance(values, dict) or not set(keys) <= values.keys():
        raise UserError(f"{path}: not {content}")
    return values


def publish_folder(folder: Path, final: Path) -> None:
    """Give the finished `folder` its final name, by rename. A folder that has this name already is replaced."""
    old = _hidden(final)
    if os.path.lexists(old):
        delete(old)
    if os.path.lexists(final):
        final.rename(old)
    folder.rename(final)
    fsync(final.parent)
    with suppress(OSError):  # it may not exist; left over, it is deleted before the next one
        delete(old)


def remove_folder(folder: Path) -> None:
    """Delete a folder. It is renamed first, so that nothing can find it half-deleted under its name."""
    old = _hidden(folder)
    folder.rename(old)
    delete(old)


def delete(path: Path) -> None:
    """Delete a file, or a folder with everything in it. Of a link, only the link is deleted."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _hidden(folder: Path) -> Path:
    return folder.with_name(f".deleting-{folder.name}")


@contextmanager
def new_parents(folder: Path) -> Iterator[None]:
    """Create the parents of `folder`. If the block fails, the new ones that are empty are removed again."""
    missing = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for parent in missing:  # innermost first
            with suppress(OSError):
                parent.rmdir()
        raise


def lack_of_room(folder: Path, needed: int) -> str | None:
    """The error if the file system of `folder` has no room for `needed` bytes; None if it has."""
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return None
    return f"{folder} has {free / 1e6:,.1f} MB free where {needed / 1e6:,.1f} MB are needed"


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed because no space is left. safetensors and shutil put the system's error into a text."""
    if getattr(error, "errno", None) in DISK_IS_FULL:
        return True
    return any(f"(os error {code})" in str(error) or f"[Errno {code}]" in str(error) for code in DISK_IS_FULL)


def fsync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, have reached the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
