"""Find documents that repeat others, or that hold items of a test.

The validation documents come first. So a training document that is also in the validation split is dropped from the
training split, and the validation loss stays that of unseen text.
"""

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from minigpt.config.arguments import DataArguments
from minigpt.data.corpora import Corpus, Documents
from minigpt.data.readers import Pieces
from minigpt.utils.errors import UserError
from minigpt.utils.files import file_sha256, read_text, write_atomically
from minigpt.utils.progress import Progress

Method = Literal["exact", "near"]
DROPPED_FILE = "dropped.jsonl"
SHINGLE_WORDS = 5  # of MinHash: two documents are compared by the sets of their sequences of so many words
PERMUTATIONS = 256  # of MinHash: the standard deviation of a similarity of 0.7 is 0.03
TEST_WORDS = 13  # a document that shares so many words in sequence with an item holds it (Brown et al. 2020)
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Dropped:
    """A document that is dropped from its split, numbered from 0 as if it were not, and what it repeats."""

    split: str
    document: int
    reason: Literal["exact", "near", "test"]
    repeats: str  # "train 17", "validation 3", or the file and line of a test item


class Repeats(Protocol):
    """Knows the documents so far."""

    def find_or_add(self, text: str, name: str) -> str | None:
        """The name of an earlier document that this one repeats; None if there is none, and it is remembered."""


class ExactRepeats:
    """Documents with the same characters, but for white space at both ends. 16 bytes of hash for each."""

    def __init__(self) -> None:
        self._names: dict[bytes, str] = {}

    def find_or_add(self, text: str, name: str) -> str | None:
        """As `Repeats`."""
        digest = hashlib.blake2b(text.strip().encode(), digest_size=16).digest()
        earlier = self._names.setdefault(digest, name)
        return None if earlier == name else earlier


class NearRepeats:
    """Documents of which a share of at least `threshold` of the sequences of five words, in either, is in both.

    datasketch's MinHash and locality-sensitive hashing find them; about 4 kB of memory for each document. A document
    with fewer words is compared exactly.
    """

    def __init__(self, threshold: float) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise UserError("dedup=near needs datasketch: pip install 'minigpt-lm[dedup]'") from error
        self.threshold = threshold
        self._empty = MinHash(num_perm=PERMUTATIONS, seed=1)
        # candidates below the threshold cost time only, since each is compared; none above it should be missed
        self._index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=(0.1, 0.9))
        self._hashes: dict[str, Any] = {}
        self._exact = ExactRepeats()

    def find_or_add(self, text: str, name: str) -> str | None:
        """As `Repeats`."""
        if (earlier := self._exact.find_or_add(text, name)) is not None:
            return earlier
        shingles = set(_sequences(text, SHINGLE_WORDS))
        if not shingles:
            return None
        minhash = self._empty.copy()
        minhash.update_batch([shingle.encode() for shingle in sorted(shingles)])
        similar = [(minhash.jaccard(self._hashes[other]), other) for other in self._index.query(minhash)]
        closest, other = max(similar, default=(0.0, ""))
        if closest >= self.threshold:
            return other
        self._index.insert(name, minhash)
        self._hashes[name] = minhash
        return None


class BenchmarkItems:
    """The sequences of 13 words of the texts in JSONL files, and whole texts that are shorter, from eight words on."""

    def __init__(self, files: Sequence[str]) -> None:
        self._places: dict[int, dict[str, str]] = {}  # by length: the words → file and line
        for name in files:
            path = Path(name).expanduser()
            for number, line in enumerate(read_text(path).splitlines(), start=1):
                try:
                    texts = list(_texts(json.loads(line)))
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path} line {number} is not JSON") from error
                for text in texts:
                    length = min(TEST_WORDS, len(WORD.findall(text)))
                    if length >= 8:
                        places = self._places.setdefault(length, {})
                        places |= dict.fromkeys(_sequences(text, length), f"{path.name} line {number}")
        if not self._places:
            raise UserError(f"decontaminate={' '.join(files)}: no text of at least eight words in it")

    def find(self, text: str) -> str | None:
        """File and line of an item that the text holds."""
        for length, places in self._places.items():
            for sequence in _sequences(text, length):
                if sequence in places:
                    return places[sequence]
        return None


class KeptDocuments(Documents):
    """The documents of a split without some."""

    def __init__(self, documents: Documents, dropped: Sequence[int]) -> None:
        self.documents = documents
        self.dropped = np.array(sorted(dropped), dtype=np.int64)

    def pieces(self, start: int = 0) -> Pieces:
        # the number of the first one, with those that are dropped before it
        first = start + int(np.searchsorted(self.dropped - np.arange(len(self.dropped)), start, side="right"))
        dropped, number = set(self.dropped.tolist()), first
        for piece, ends in self.documents.pieces(first):
            if number not in dropped:
                yield piece, ends
            number += ends


def drops(args: DataArguments) -> bool:
    """Whether `args` ask for documents to be dropped."""
    return args.dedup is not None or args.decontaminate is not None


def deduplicated(args: DataArguments, corpus: Corpus, folder: Path) -> Corpus:
    """The corpus without what `args` drop: it is found and told the first time, and listed in `folder`."""
    if not drops(args):
        return corpus
    if not (folder / DROPPED_FILE).is_file():
        with Progress("comparing documents", corpus.text_bytes, "B", unit_scale=True) as bar:
            found = list(find_dropped(corpus, args.dedup, args.dedup_threshold, args.decontaminate or [], bar.update))
        lines = "".join(json.dumps(asdict(entry)) + "\n" for entry in found)
        write_atomically(folder / DROPPED_FILE, lines)
        for line in summary(found):
            print(line, file=sys.stderr)
    dropped = read_dropped(folder)
    train, validation = (
        KeptDocuments(documents, [entry.document for entry in dropped if entry.split == split])
        for split, documents in (("train", corpus.train), ("validation", corpus.validation))
    )
    return replace(corpus, train=train, validation=validation)


def find_dropped(
    corpus: Corpus, method: Method | None, threshold: float, tests: Sequence[str], progress: Callable[[int], None]
) -> Iterator[Dropped]:
    """The documents to drop, in order. `progress` is called with the bytes of each document."""
    repeats: Repeats | None = None
    if method is not None:
        repeats = ExactRepeats() if method == "exact" else NearRepeats(threshold)
    items = BenchmarkItems(tests) if tests else None
    for split, documents in (("validation", corpus.validation), ("train", corpus.train)):
        for number, text in enumerate(_whole(documents)):
            progress(len(text.encode()))
            # the validation split is not trained on, so test items may be in it
            if split == "train" and items is not None and (place := items.find(text)) is not None:
                yield Dropped(split, number, "test", place)
            elif repeats is not None and (earlier := repeats.find_or_add(text, f"{split} {number}")) is not None:
                assert method is not None
                yield Dropped(split, number, method, earlier)


def read_dropped(folder: Path) -> list[Dropped]:
    """What `deduplicated` has listed in `folder`."""
    lines = (folder / DROPPED_FILE).read_text(encoding="utf-8").splitlines()
    return [Dropped(**json.loads(line)) for line in lines]


def describe_dropped(folder: Path) -> dict[str, Any]:
    """The entry in the manifest: how many of each split and reason, and the file that lists them."""
    dropped = read_dropped(folder)
    counts = Counter((entry.split, entry.reason) for entry in dropped)
    leaked = sum(entry.split == "train" and entry.repeats.startswith("validation ") for entry in dropped)
    return {
        "file": DROPPED_FILE,
        "sha256": file_sha256(folder / DROPPED_FILE),
        "documents": [
            {"split": split, "reason": reason, "documents": count} for (split, reason), count in sorted(counts.items())
        ],
        "training_documents_in_validation": leaked,
    }


def summary(dropped: Sequence[Dropped]) -> Iterator[str]:
    """What was dropped: a line for each split and reason, with an example."""
    reasons = {"exact": "repeat others", "near": "nearly repeat others", "test": "hold items of a test"}
    for (split, reason), count in sorted(Counter((entry.split, entry.reason) for entry in dropped).items()):
        found = [entry for entry in dropped if (entry.split, entry.reason) == (split, reason)]
        leaked = sum(entry.repeats.startswith("validation ") for entry in found) if split == "train" else 0
        of_them = f", {leaked:,} of them validation documents" if leaked else ""
        yield (
            f"dropped from {split}: {count:,} documents that {reasons[reason]}{of_them}; for example document "
            f"{found[0].document}, by {found[0].repeats}"
        )


def _whole(documents: Documents) -> Iterator[str]:
    parts: list[str] = []
    for piece, ends in documents.pieces():
        parts.append(str(piece))
        if ends:
            yield "".join(parts)
            parts.clear()
    if parts:
        yield "".join(parts)


def _sequences(text: str, length: int) -> Iterator[str]:
    """All sequences of `length` words, in lower case and without punctuation."""
    words = WORD.findall(text.lower())
    for start in range(len(words) - length + 1):
        yield " ".join(words[start : start + length])


def _texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
