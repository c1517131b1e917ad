"""Checksums of checkpoint folders: write them, find damage, choose the newest undamaged checkpoint."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

from minigpt.utils.errors import UserError
from minigpt.utils.files import delete, file_sha256, fsync, read_json
from minigpt.utils.run_files import CHECKSUMS_FILE, METRICS_FILE


def checksum(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, which is flushed to the disk."""
    fsync(path)
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def log_checksum(log: Path, size: int) -> dict[str, Any]:
    """SHA-256 of the first `size` bytes of a metrics.jsonl, and how many there are."""
    with log.open("rb") as file:
        content = file.read(size)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_checksums(folder: Path, known: Mapping[str, dict[str, Any]] = MappingProxyType({})) -> None:
    """Write checkpoint.json, the checksums of all files in `folder`, and flush all to the disk.

    It also has the checksum of what the log of the run has become by now, which only grows: `minigpt audit` compares.
    known: the checksums of files that other processes have written.
    """
    files = {
        name: known.get(name) or checksum(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (name := path.relative_to(folder).as_posix())
    }
    log = folder.parent / METRICS_FILE
    sums = {"files": files} | ({"log": log_checksum(log, log.stat().st_size)} if log.is_file() else {})
    (folder / CHECKSUMS_FILE).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
    fsync(folder / CHECKSUMS_FILE)
    for path in [path for path in folder.rglob("*") if path.is_dir()] + [folder]:
        fsync(path)


def find_damage(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """A sentence about the first file that is not as it was written; None if the checkpoint is undamaged.

    With `parts`, this is one of so many processes that each read a part of the files.
    """
    if not (checkpoint / CHECKSUMS_FILE).is_file():
        return f"{CHECKSUMS_FILE} is missing"
    try:
        files = read_json(checkpoint / CHECKSUMS_FILE, "checksums", ["files"])["files"]
        expected = {name: (record["bytes"], record["sha256"]) for name, record in files.items()}
    except (UserError, KeyError, TypeError, AttributeError):  # not JSON, or JSON of another form
        return f"{CHECKSUMS_FILE} is damaged"
    by_size = sorted(expected, key=lambda name: (-expected[name][0], name))
    for name in by_size[part::parts]:
        size, digest = expected[name]
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
        if file_sha256(path) != digest:
            return f"{name} has changed since it was written: its SHA-256 differs"
    return None


def newest_undamaged(
    checkpoints: Sequence[Path], damage: Callable[[Path], str | None] = find_damage
) -> tuple[Path | None, list[str]]:
    """The newest undamaged one (None if there is none) of checkpoints, and a note on each newer one that is damaged.

    checkpoints: the oldest first.
    """
    notes: list[str] = []
    for checkpoint in reversed(checkpoints):
        problem = damage(checkpoint)
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
