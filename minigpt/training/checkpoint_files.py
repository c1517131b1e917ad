"""Checkpoint folders that appear whole or not at all, sealed with hashes."""

import json
import shutil
from pathlib import Path

from minigpt.utils.files import file_sha256, fsync
from minigpt.utils.run_files import SEAL_FILE, find_checkpoints


def seal(aside: Path) -> None:
    """Write the list of the files in `aside`, and see to it that all of them have reached the disk."""
    files = {
        path.relative_to(aside).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(aside.rglob("*"))
        if path.is_file()
    }
    (aside / SEAL_FILE).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
    for path in [*aside.rglob("*"), aside]:
        fsync(path)


def clear_leftovers(run_dir: Path) -> None:
    """Delete what a kill has left of checkpoints that were being written or deleted."""
    for pattern in (".writing-*", ".deleting-*"):
        for folder in run_dir.glob(pattern):
            shutil.rmtree(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when every file is what was written."""
    try:
        files = json.loads((folder / SEAL_FILE).read_text(encoding="utf-8"))["files"]
        expected = {name: (record["bytes"], record["sha256"]) for name, record in files.items()}
    except FileNotFoundError:
        return f"{SEAL_FILE} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{SEAL_FILE} is damaged"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
        if file_sha256(path) != digest:
            return f"{name} is not what was written: its sha256 differs"
    return None


def newest_sound(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of which every file is what was written, and a note on each newer one."""
    notes: list[str] = []
    for folder in reversed(find_checkpoints(run_dir)):
        problem = damage(folder)
        if problem is None:
            return folder, notes
        notes.append(f"{folder} is damaged and left out: {problem}")
    return None, notes
