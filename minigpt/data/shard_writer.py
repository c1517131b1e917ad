"""Write token shards so that an interrupted preparation can resume.

Shards are written into a hidden folder beside the final one. Each shard appears there by rename when it is complete,
and the journal is then told where in the text the next one begins; so whoever finds the folder after a kill goes on
after the last whole shard. At the end the folder takes its final name.
"""

import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minigpt.data.encoding import Encoded
from minigpt.data.shards import FORMAT, FORMAT_VERSION, IN_LOSS, MANIFEST
from minigpt.utils.errors import UserError
from minigpt.utils.files import publish_folder, write_atomically

JOURNAL = "journal.json"


@dataclass
class Progress:
    """How far a split has come: what its whole shards hold, and where the text goes on.

    `documents`, `text_bytes` and `targets` (of examples) count what ends before part `part` of document `document`;
    the next shard begins `skip` tokens into the batch that begins there.
    """

    shards: list[dict[str, Any]] = field(default_factory=list)
    documents: int = 0
    text_bytes: int = 0
    targets: int = 0
    document: int = 0
    part: int = 0
    skip: int = 0
    done: bool = False

    @property
    def tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.shards)

    def as_split(self) -> dict[str, Any]:
        """What the manifest says about the split."""
        targets = {"targets": self.targets} if any("marks" in shard for shard in self.shards) else {}
        return {
            "tokens": self.tokens,
            **targets,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "shards": self.shards,
        }


class Journal:
    """The progress of every split, kept in the folder of the shards.

    `key` stands for everything that decides the tokens: a folder that was begun with another one is cleared.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.splits: dict[str, Progress] = {}
        try:
            found = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
            if found["key"] != key:
                raise ValueError("another preparation")
            self.splits = {name: Progress(**progress) for name, progress in found["splits"].items()}
            for shard in (shard for progress in self.splits.values() for shard in progress.shards):
                for record in [shard, *([shard["marks"]] if "marks" in shard else [])]:
                    (folder / record["file"]).stat()
        except (OSError, ValueError, KeyError, TypeError):
            self.splits = {}
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def shards(self) -> int:
        """How many shards are whole."""
        return sum(len(progress.shards) for progress in self.splits.values())

    def split(self, name: str) -> Progress:
        """The progress of one split, which its writer keeps up to date."""
        return self.splits.setdefault(name, Progress())

    def save(self) -> None:
        """Keep the progress, by rename and on the disk."""
        state = {"key": self.key, "splits": {name: asdict(progress) for name, progress in self.splits.items()}}
        write_atomically(self.folder / JOURNAL, json.dumps(state).encode())


class SplitWriter:
    """Appends encoded batches to one split, from where the journal says that it stopped.

    Shards hold exactly `shard_tokens` tokens, the last one the rest; nothing depends on how the work was interrupted.
    """

    def __init__(self, journal: Journal, split: str, dtype: np.dtype, shard_tokens: int) -> None:
        self.journal, self.split, self.dtype, self.shard_tokens = journal, split, dtype, shard_tokens
        self.progress = journal.split(split)
        self._skip = self.progress.skip
        self._files: dict[str, _PartialFile] = {}  # by suffix: the ids, and their marks if there are any
        self._tokens = 0

    def write(self, encoded: Encoded) -> None:
        """Append a batch; the first one is that which begins at `progress.document` and `progress.part`."""
        here = self.progress
        assert (encoded.document, encoded.part) >= (here.document, here.part), "a batch was written before"
        if len(encoded.ids) and int(encoded.ids.max()) > np.iinfo(self.dtype).max:
            raise UserError(f"token id {int(encoded.ids.max())} does not fit {self.dtype.name}")
        ids = encoded.ids.astype(self.dtype, copy=False)
        at, self._skip = self._skip, 0
        here.document, here.part = encoded.document, encoded.part
        while at < len(ids):
            end = min(len(ids), at + self.shard_tokens - self._tokens)
            self._append("bin", ids[at:end])
            if encoded.marks is not None:
                self._append("marks", encoded.marks[at:end])
            self._tokens += end - at
            at = end
            if self._tokens == self.shard_tokens:
                here.skip = at
                self._finish_shard()
        here.skip = 0
        here.documents += encoded.documents
        here.text_bytes += encoded.text_bytes
        if encoded.marks is not None:
            here.targets += int(np.count_nonzero(encoded.marks & IN_LOSS))

    def close(self) -> Progress:
        """Finish the last shard."""
        if self._files:
            self._finish_shard()
        self.progress.done = True
        self.journal.save()
        return self.progress

    def abandon(self) -> None:
        """Let go of a shard that will not be finished."""
        for file in self._files.values():
            with suppress(OSError):
                file.file.close()

    def _append(self, suffix: str, values: np.ndarray) -> None:
        if suffix not in self._files:
            name = f"{self.split}-{len(self.progress.shards):05d}.{suffix}"
            self._files[suffix] = _PartialFile(self.journal.folder / name)
        self._files[suffix].write(values.tobytes())

    def _finish_shard(self) -> None:
        files = {suffix: file.finish() for suffix, file in self._files.items()}
        marks = {"marks": files["marks"]} if "marks" in files else {}
        self.progress.shards.append({"file": files["bin"]["file"], "tokens": self._tokens, **files["bin"], **marks})
        self._files, self._tokens = {}, 0
        self.journal.save()


class _PartialFile:
    """A file that has another name until it is whole."""

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.file = self.partial.open("wb")
        self.digest = hashlib.sha256()

    def write(self, block: bytes) -> None:
        self.file.write(block)
        self.digest.update(block)

    def finish(self) -> dict[str, str]:
        """Give the file its name, when its content is on the disk. Returns what the manifest says about it."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.partial.rename(self.path)
        return {"file": self.path.name, "sha256": self.digest.hexdigest()}


def write_manifest(folder: Path, dtype: np.dtype, vocab_size: int, splits: dict[str, Progress], **about: Any) -> None:
    """Write `manifest.json` beside the shards; `about` says where the tokens come from (tokenizer_hash, source, …)."""
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "dtype": dtype.name,
        "vocab_size": vocab_size,
        **about,
        "splits": {name: progress.as_split() for name, progress in splits.items()},
    }
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False).encode())


def publish(folder: Path, final: Path) -> None:
    """Give a finished `folder` of shards the name `final`; a folder that has this name already is replaced."""
    for leftover in folder.glob("*.partial"):
        leftover.unlink()
    publish_folder(folder, final)
    forget_journal(final)


def forget_journal(final: Path) -> None:
    """Take away the journal of a folder that has its final name."""
    (final / JOURNAL).unlink(missing_ok=True)


def is_finished(final: Path, key: str) -> bool:
    """Whether `final` is the result of the preparation `key`, which was killed just before it forgot its journal."""
    with suppress(OSError, ValueError, KeyError):
        return bool(json.loads((final / JOURNAL).read_text(encoding="utf-8"))["key"] == key)
    return False
