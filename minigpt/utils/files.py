"""Files and folders that appear whole or not at all, their hashes, and the room they need."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file as hexadecimal digits, read a few megabytes at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that is either the old one or the whole new one, whenever the process or the machine stops."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    fsync(path.parent)


def publish_folder(folder: Path, final: Path) -> None:
    """Give the finished `folder` its final name, by rename. A folder that has this name already is replaced."""
    old = _hidden(final)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    folder.rename(final)
    fsync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder. It is renamed first, so that nothing can find it half-deleted under its name."""
    old = _hidden(folder)
    folder.rename(old)
    shutil.rmtree(old)


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


def fsync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, have reached the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
