"""Is a checkpoint whole? It appears by a rename, with the size and hash of each of its files, or not at all.

checkpoint-<step>/
    checkpoint.json          {"files": {name: {"bytes": …, "sha256": …}}}, written last
    …                        what minigpt.checkpoint puts there
"""

import json
import os
import shutil
from pathlib import Path

from minigpt.shards import file_sha256

LIST_FILE = "checkpoint.json"


def seal(aside: Path) -> None:
    """Write the list of the files in `aside`, and see to it that all of them have reached the disk."""
    files = {
        path.relative_to(aside).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(aside.rglob("*"))
        if path.is_file()
    }
    (aside / LIST_FILE).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
    for path in [*aside.rglob("*"), aside]:
        reach_disk(path)


def publish(aside: Path, folder: Path) -> None:
    """Make the sealed folder `aside` appear as `folder`."""
    if folder.exists():
        remove(folder)
    aside.rename(folder)
    reach_disk(folder.parent)


def remove(folder: Path) -> None:
    """Delete a checkpoint; nobody ever sees half of it under its name."""
    aside = folder.with_name(f".deleting-{folder.name}")
    folder.rename(aside)
    shutil.rmtree(aside)


def clear_leftovers(run_dir: Path) -> None:
    """Delete what a kill has left of checkpoints that were being written or deleted."""
    for pattern in (".writing-*", ".deleting-*"):
        for folder in run_dir.glob(pattern):
            shutil.rmtree(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when every file is what was written."""
    try:
        files = json.loads((folder / LIST_FILE).read_text(encoding="utf-8"))["files"]
        expected = {name: (record["bytes"], record["sha256"]) for name, record in files.items()}
    except FileNotFoundError:
        return f"{LIST_FILE} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{LIST_FILE} is damaged"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
        if file_sha256(path) != digest:
            return f"{name} is not what was written: its sha256 differs"
    return None


def find_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints in `run_dir`, oldest first."""
    return sorted((path for path in run_dir.glob("checkpoint-*") if path.name[11:].isdigit()), key=_step)


def newest_sound(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of which every file is what was written, and a note on each newer one."""
    notes: list[str] = []
    for folder in reversed(find_checkpoints(run_dir)):
        problem = damage(folder)
        if problem is None:
            return folder, notes
        notes.append(f"{folder} is damaged and left out: {problem}")
    return None, notes


def _step(folder: Path) -> int:
    return int(folder.name[11:])


def lack_of_room(folder: Path, needed: int) -> str | None:
    """In words, that the file system of `folder` has no room for `needed` bytes; None when it has."""
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return None
    return f"{folder} has {free / 1e6:,.1f} MB free where {needed / 1e6:,.1f} MB are needed"


def reach_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
