"""Encode one text on several machines that share a folder.

Every machine reads the whole text, which is fast, and encodes its share of the batches, which is slow. Machine 0 puts
the batches of all together and writes the shards, so the result has the bytes that one machine would write. The others
write each encoded batch into a file, which machine 0 deletes once a shard with its tokens is complete. Machines can be
killed and started again in any order.
"""

import json
import shutil
import sys
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minigpt.data.encoding import DocumentBatch, EncodedBatch, EncoderSpec, encode_all
from minigpt.data.shard_writer import JOURNAL, SplitProgress
from minigpt.data.shards import MANIFEST
from minigpt.utils.errors import UserError
from minigpt.utils.files import fsync

BATCHES_DIR = "batches"
LOOK_EVERY_S, TELL_EVERY_S = 0.2, 60


@dataclass(frozen=True)
class Machines:
    """How many machines prepare a text, and which one this is."""

    count: int = 1
    rank: int = 0

    def owns(self, split: str, batch: DocumentBatch) -> bool:
        """Whether this machine encodes a batch. It depends on where the batch starts, so a restart changes nothing."""
        return zlib.crc32(f"{split} {batch.document} {batch.part}".encode()) % self.count == self.rank


ONE_MACHINE = Machines()


class SharedFolder:
    """What the machines tell each other in the folder of an unfinished preparation."""

    def __init__(self, folder: Path, machines: Machines) -> None:
        self.folder, self.machines = folder, machines
        self.batches = folder / BATCHES_DIR

    def encode(
        self,
        document_batches: Iterable[DocumentBatch],
        spec: EncoderSpec,
        workers: int,
        split: str,
        progress: SplitProgress,
    ) -> Iterator[EncodedBatch]:
        """All batches in order: encoded here, or by the other machines. For machine 0.

        progress: what is written of the split; a batch of another machine is deleted when a complete shard has it.
        """
        used: list[Path] = []
        complete_shards = len(progress.shards)
        for batch, file in self._in_order(document_batches, spec, workers, split):
            yield batch
            if len(progress.shards) > complete_shards:  # the next one starts in this batch, which is still needed
                complete_shards = len(progress.shards)
                for earlier in used:
                    earlier.unlink()
                used.clear()
            if file is not None:
                used.append(file)

    def _in_order(
        self, document_batches: Iterable[DocumentBatch], spec: EncoderSpec, workers: int, split: str
    ) -> Iterator[tuple[EncodedBatch, Path | None]]:
        """All batches in order, each with its file if another machine has encoded it."""
        files: deque[Path | None] = deque()  # of the batches that come next

        def own_batches() -> Iterator[DocumentBatch]:
            for batch in document_batches:
                is_own = self.machines.owns(split, batch)
                files.append(None if is_own else self._file(split, batch))
                if is_own:
                    yield batch

        for own in encode_all(own_batches(), spec, workers):
            while (file := files.popleft()) is not None:
                yield self._wait_for(file), file
            yield own, None
        for file in filter(None, files):
            yield self._wait_for(file), file

    def encode_share(
        self, document_batches: Iterable[DocumentBatch], spec: EncoderSpec, workers: int, split: str
    ) -> int:
        """Encode the batches of this machine into files. For all machines but 0. Returns how many there are."""
        count = 0

        def missing() -> Iterator[DocumentBatch]:
            nonlocal count
            for batch in document_batches:
                if self.machines.owns(split, batch):
                    count += 1
                    if not self._file(split, batch).exists():
                        yield batch

        for batch in encode_all(missing(), spec, workers):
            file = self._file(split, batch)
            partial = file.with_suffix(".partial")
            marks = np.empty(0, np.uint8) if batch.marks is None else batch.marks
            counts = np.array([batch.document, batch.part, batch.documents, batch.text_bytes])
            with partial.open("wb") as target:
                np.savez(target, ids=batch.ids, marks=marks, counts=counts)
            fsync(partial)
            partial.rename(file)
        return count

    def start(self) -> None:
        """Make the folder for the batches, and forget the errors of an earlier try. For machine 0."""
        self.batches.mkdir(exist_ok=True)
        for report in self.batches.glob("error-*"):
            report.unlink()

    def wait_for_start(self, key: str, output_dir: Path) -> bool:
        """Wait until machine 0 has a tokenizer for the preparation `key`. Returns whether all is done already."""
        told = time.monotonic() - TELL_EVERY_S + 5
        while not ((self.folder / "tokenizer").is_dir() and self.batches.is_dir() and self._key() == key):
            if (output_dir / MANIFEST).is_file() and not self.folder.exists():
                return True
            if time.monotonic() - told > TELL_EVERY_S:
                told = time.monotonic()
                other = "" if self._key() in (None, key) else ": it prepares other text, or with other options"
                print(f"waiting for machine 0{other}", file=sys.stderr, flush=True)
            time.sleep(LOOK_EVERY_S)
        return False

    def report(self, error: UserError) -> None:
        """Let machine 0 end with this error too."""
        with suppress(FileNotFoundError):  # machine 0 has ended already, and deleted the folder
            (self.batches / f"error-{self.machines.rank}").write_text(str(error), encoding="utf-8")

    def finish(self) -> None:
        """Delete the folder of the batches. For machine 0."""
        shutil.rmtree(self.batches, ignore_errors=True)

    def _key(self) -> str | None:
        try:
            key: str = json.loads((self.folder / JOURNAL).read_text(encoding="utf-8"))["key"]
        except (OSError, ValueError):
            return None
        return key

    def _file(self, split: str, batch: DocumentBatch | EncodedBatch) -> Path:
        return self.batches / f"{split}-{batch.document}-{batch.part}.npz"

    def _wait_for(self, file: Path) -> EncodedBatch:
        told = time.monotonic()
        while not file.exists():
            for report in self.batches.glob("error-*"):
                raise UserError(f"machine {report.name[6:]}: {report.read_text(encoding='utf-8')}")
            if time.monotonic() - told > TELL_EVERY_S:
                told = time.monotonic()
                print("waiting for another machine; start it again if it has ended", file=sys.stderr, flush=True)
            time.sleep(LOOK_EVERY_S)
        with np.load(file, allow_pickle=False) as saved:
            document, part, documents, text_bytes = map(int, saved["counts"])
            marks = saved["marks"]
            return EncodedBatch(document, part, saved["ids"], documents, text_bytes, marks if len(marks) else None)
