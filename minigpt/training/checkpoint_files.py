"""Checksums of checkpoint folders: write them, find damage, choose the newest undamaged checkpoint."""

import json
from itertools import count
from pathlib import Path

from minigpt.utils.errors import UserError
from minigpt.utils.files import delete, file_sha256, fsync, read_json
from minigpt.utils.run_files import CHECKSUMS_FILE, find_checkpoints


def write_checksums(folder: Path) -> None:
    """Write checkpoint.json, size and SHA-256 of every file in `folder`, and flush all to the disk."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / CHECKSUMS_FILE).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
    for path in [*folder.rglob("*"), folder]:
        fsync(path)


def find_damage(checkpoint: Path) -> str | None:
    """A sentence about the first file that is not as it was written; None if the checkpoint is undamaged."""
    if not (checkpoint / CHECKSUMS_FILE).is_file():
        return f"{CHECKSUMS_FILE} is missing"
    try:
        files = read_json(checkpoint / CHECKSUMS_FILE, "checksums", ["files"])["files"]
        expected = {name: (record["bytes"], record["sha256"]) for name, record in files.items()}
    except (UserError, KeyError, TypeError, AttributeError):  # not JSON, or JSON of another form
        return f"{CHECKSUMS_FILE} is damaged"
    for name, (size, digest) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
        if file_sha256(path) != digest:
            return f"{name} has changed since it was written: its SHA-256 differs"
    return None


def newest_undamaged(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint (None if there is none), and a note on each newer one that is damaged."""
    notes: list[str] = []
    for checkpoint in reversed(find_checkpoints(run_dir)):
        problem = find_damage(checkpoint)
        if problem is None:
            return checkpoint, notes
        notes.append(f"{checkpoint} is damaged and skipped: {problem}")
    return None, notes


def set_aside(checkpoint: Path, reason: str) -> Path:
    """Rename a checkpoint to `checkpoint-<step>.<reason>`, where neither resuming nor deleting finds it."""
    target = checkpoint.with_name(f"{checkpoint.name}.{reason}")
    for number in count(2):
        if not target.exists():
            break
        target = checkpoint.with_name(f"{checkpoint.name}.{reason}-{number}")
    checkpoint.rename(target)
    fsync(checkpoint.parent)
    return target


def remove_leftovers(run_dir: Path) -> None:
    """Delete the checkpoints that were being written or deleted when an earlier process was killed."""
    for pattern in (".writing-*", ".deleting-*"):
        for path in run_dir.glob(pattern):
            delete(path)
