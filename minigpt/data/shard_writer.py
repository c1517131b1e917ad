"""Write token shards so that an interrupted preparation can resume.

Shards are written into a hidden folder next to the final one. Each shard is renamed when it is complete, and then the
journal records where in the text the next one starts. A preparation that finds the folder of an interrupted one
resumes after the last complete shard. At the end the folder gets its final name.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minigpt.data.encoding import EncodedBatch, ResumableError
from minigpt.data.shards import FORMAT, FORMAT_VERSION, IN_LOSS, MANIFEST
from minigpt.utils.files import fsync, publish_folder, write_atomically

JOURNAL = "journal.json"

ShardRecord = dict[str, Any]  # file, tokens, sha256; and marks (file, sha256) if the shard has a loss mask


def files_of(shard: ShardRecord) -> Iterator[dict[str, str]]:
    """The records, with `file` and `sha256`, of a shard's one or two files."""
    yield shard
    if "marks" in shard:
        yield shard["marks"]


@dataclass
class SplitProgress:
    """How much of a split is written: the complete shards, and where in the text the next one starts.

    `documents`, `text_bytes` and `targets` (of examples) count what is before part `part` of document `document`. The
    next shard starts `skip` tokens into the batch that starts there.
    """

    shards: list[ShardRecord] = field(default_factory=list)
    documents: int = 0
    text_bytes: int = 0
    targets: int = 0
    document: int = 0
    part: int = 0
    skip: int = 0
    done: bool = False

    @property
    def tokens(self) -> int:
        """Tokens in the complete shards."""
        return sum(shard["tokens"] for shard in self.shards)

    def manifest_entry(self) -> dict[str, Any]:
        """The split's entry in the manifest."""
        targets = {"targets": self.targets} if any("marks" in shard for shard in self.shards) else {}
        return {
            "tokens": self.tokens,
            **targets,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "shards": self.shards,
        }


def read_progress(folder: Path) -> dict[str, SplitProgress]:
    """The progress of every split in the journal of `folder`."""
    splits = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))["splits"]
    return {name: SplitProgress(**progress) for name, progress in splits.items()}


class Journal:
    """The progress of every split, kept in the folder of the shards.

    `key` is a hash of everything that decides the tokens. A folder that was started with another key, or that lacks a
    shard of its journal, is emptied.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.splits: dict[str, SplitProgress] = {}
        try:
            state = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
            if state["key"] != key:
                raise ValueError("the journal of another preparation")
            self.splits = read_progress(folder)
            for progress in self.splits.values():
                for shard in progress.shards:
                    for record in files_of(shard):
                        (folder / record["file"]).stat()
        except (OSError, ValueError, KeyError, TypeError):
            self.splits = {}
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def shards(self) -> int:
        """Number of complete shards."""
        return sum(len(progress.shards) for progress in self.splits.values())

    def split(self, name: str) -> SplitProgress:
        """The progress of one split, which its writer updates."""
        return self.splits.setdefault(name, SplitProgress())

    def save(self) -> None:
        """Write the journal to disk, atomically."""
        state = {"key": self.key, "splits": {name: asdict(progress) for name, progress in self.splits.items()}}
        write_atomically(self.folder / JOURNAL, json.dumps(state))


class SplitWriter:
    """Appends encoded batches to one split, from the place that the journal records.

    Every shard has exactly `shard_tokens` tokens, except the last one. The files do not depend on interruptions.
    """

    def __init__(self, journal: Journal, split: str, dtype: np.dtype, shard_tokens: int) -> None:
        self.journal, self.split, self.dtype, self.shard_tokens = journal, split, dtype, shard_tokens
        self.progress = journal.split(split)
        self._check_complete_shards()
        self._skip = self.progress.skip
        self._files: dict[str, _PartialFile] = {}  # of the current shard, by suffix: "bin", and "marks" for examples
        self._tokens = 0  # in the current shard

    def write(self, batch: EncodedBatch) -> None:
        """Append a batch. The first one must start at `progress.part` of `progress.document`.

        Raises ValueError if an id does not fit `dtype`.
        """
        progress = self.progress
        assert (batch.document, batch.part) >= (progress.document, progress.part), "this batch was written before"
        if len(batch.ids) and int(batch.ids.max()) > np.iinfo(self.dtype).max:
            raise ValueError(f"token id {int(batch.ids.max())} does not fit {self.dtype.name}")
        ids = batch.ids.astype(self.dtype, copy=False)
        start, self._skip = self._skip, 0
        progress.document, progress.part = batch.document, batch.part
        while start < len(ids):
            stop = min(len(ids), start + self.shard_tokens - self._tokens)
            self._append("bin", ids[start:stop])
            if batch.marks is not None:
                self._append("marks", batch.marks[start:stop])
            self._tokens += stop - start
            start = stop
            if self._tokens == self.shard_tokens:
                progress.skip = start
                self._finish_shard()
        progress.skip = 0
        progress.documents += batch.documents
        progress.text_bytes += batch.text_bytes
        if batch.marks is not None:
            progress.targets += int(np.count_nonzero(batch.marks & IN_LOSS))

    def _check_complete_shards(self) -> None:
        """Raises ResumableError if a shard has no longer the size that it had when the journal recorded it."""
        for shard in self.progress.shards:
            for record in files_of(shard):
                path = self.journal.folder / record["file"]
                expected = shard["tokens"] * (self.dtype.itemsize if record is shard else 1)
                if path.stat().st_size != expected:
                    raise ResumableError(
                        f"{path} has {path.stat().st_size} bytes where {expected} were written; delete "
                        f"{self.journal.folder} and run the same command again to start from the beginning"
                    )

    def close(self) -> SplitProgress:
        """Finish the last shard and return the totals of the split."""
        if self._files:
            self._finish_shard()
        self.progress.done = True
        self.journal.save()
        return self.progress

    def abandon(self) -> None:
        """Close the files of a shard that will not be finished."""
        for file in self._files.values():
            with suppress(OSError):
                file.file.close()

    def _append(self, suffix: str, values: np.ndarray) -> None:
        if suffix not in self._files:
            name = f"{self.split}-{len(self.progress.shards):05d}.{suffix}"
            self._files[suffix] = _PartialFile(self.journal.folder / name)
        self._files[suffix].write(values.tobytes())

    def _finish_shard(self) -> None:
        records = {suffix: file.finish() for suffix, file in self._files.items()}
        marks = {"marks": records["marks"]} if "marks" in records else {}
        shard = {"file": records["bin"]["file"], "tokens": self._tokens, **records["bin"], **marks}
        self.progress.shards.append(shard)
        self._files, self._tokens = {}, 0
        self.journal.save()


class _PartialFile:
    """A file written block by block, which gets its name when it is complete."""

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.file = self.partial.open("wb")
        self.digest = hashlib.sha256()

    def write(self, block: bytes) -> None:
        self.file.write(block)
        self.digest.update(block)

    def finish(self) -> dict[str, str]:
        """Rename the file once its content is on the disk. Returns its record for the manifest."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.partial.rename(self.path)
        fsync(self.path.parent)
        return {"file": self.path.name, "sha256": self.digest.hexdigest()}


def write_manifest(
    folder: Path, dtype: np.dtype, vocab_size: int, splits: dict[str, SplitProgress], **origin: Any
) -> None:
    """Write `manifest.json` next to the shards. `origin` describes the tokens (tokenizer_hash, source, options, …)."""
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "dtype": dtype.name,
        "vocab_size": vocab_size,
        **origin,
        "splits": {name: progress.manifest_entry() for name, progress in splits.items()},
    }
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False))


def publish(folder: Path, final: Path) -> None:
    """Give a finished folder of shards its `final` name. A folder that has this name already is replaced."""
    for leftover in folder.glob("*.partial"):
        leftover.unlink()
    publish_folder(folder, final)
    forget_journal(final)


def forget_journal(final: Path) -> None:
    """Delete the journal of a folder that has its final name."""
    (final / JOURNAL).unlink(missing_ok=True)


def is_finished(final: Path, key: str) -> bool:
    """Whether `final` is the complete result of the preparation `key`, killed before it could delete its journal."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return bool(json.loads((final / JOURNAL).read_text(encoding="utf-8"))["key"] == key)
    return False
