"""Token shards on disk: the format, and reading it.

train-00000.bin  validation-00000.bin  …   uint16 if every id fits, else uint32
    train-00000.marks  …                       a byte a token, where not every token is a target: see IN_LOSS
    manifest.json                              counts, hashes, tokenizer and source of the above
    tokenizer/                                 what `AutoTokenizer.from_pretrained` reads

Other programs' shards are read as they are: nanoGPT's `train.bin` and `val.bin`, build-nanogpt's `…train….npy` and
`…val….npy`, llm.c's `…train….bin` and `…val….bin` with a header. They have no manifest, so less is known of them.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from minigpt.utils.errors import UserError

FORMAT = "minigpt-token-shards"

FORMAT_VERSION = 1

MANIFEST = "manifest.json"

IN_LOSS, ENDS_DOCUMENT = 1, 2  # bits of a mark: the token is a target; the token is the last of its document

LLMC_HEADER_BYTES = 1024

LLMC_DTYPES = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # by magic number and version: GPT-2's and Llama 3's ids


def smallest_dtype(vocab_size: int) -> np.dtype:
    """uint16 when every id below `vocab_size` fits, else uint32; little-endian either way."""
    if not 0 < vocab_size <= 2**32:
        raise UserError(f"vocab_size={vocab_size} does not fit 32-bit token ids")
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


@dataclass(frozen=True)
class Shard:
    """One file of token ids: `tokens` ids from byte `offset` on, and the file of their marks if they have any."""

    path: Path
    tokens: int
    offset: int = 0
    marks: Path | None = None


class Tokens:
    """The token ids of one split, memory-mapped over any number of shards; positions are 64-bit."""

    def __init__(
        self, shards: list[Shard], dtype: np.dtype, text_bytes: int | None = None, documents: int | None = None
    ) -> None:
        self.shards = shards
        self.dtype = np.dtype(dtype)
        self.text_bytes = text_bytes  # UTF-8 bytes of the text, end-of-text tokens excluded; None if unknown
        self.documents = documents
        self._ends = list(accumulate(shard.tokens for shard in shards))
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # numpy would pickle the mapped data; a worker maps the files itself

    @property
    def marked(self) -> bool:
        """Whether some tokens are no targets."""
        return any(shard.marks for shard in self.shards)

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy of the ids at positions [start, stop), across shards. Raises IndexError outside the split."""
        out = np.empty(self._checked(start, stop), self.dtype)
        for index, begin, at, length in self._spans(start, stop):
            out[at : at + length] = self._map(index)[begin : begin + length]
        return out

    def marks(self, start: int, stop: int, end_of_text: int | None = None) -> np.ndarray:
        """The marks of positions [start, stop), uint8.

        Where a shard has none, every token is in the loss, and `end_of_text` ends a document.
        """
        out = np.empty(self._checked(start, stop), np.uint8)
        for index, begin, at, length in self._spans(start, stop):
            if self.shards[index].marks:
                out[at : at + length] = self._map_marks(index)[begin : begin + length]
            else:
                ends = self._map(index)[begin : begin + length] == (-1 if end_of_text is None else end_of_text)
                out[at : at + length] = IN_LOSS + ENDS_DOCUMENT * ends
        return out

    def _checked(self, start: int, stop: int) -> int:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens [{start}, {stop}) are outside a split of {len(self)} tokens")
        return stop - start

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """The parts of [start, stop) shard by shard: (shard, place in it, place in the result, length)."""
        index, done = bisect_right(self._ends, start), 0
        while start + done < stop:
            begin = start + done - (self._ends[index] - self.shards[index].tokens)
            length = min(stop - start - done, self.shards[index].tokens - begin)
            yield index, begin, done, length
            index, done = index + 1, done + length

    def _map(self, index: int) -> np.ndarray:
        if index not in self._maps:
            shard = self.shards[index]
            self._maps[index] = np.memmap(shard.path, self.dtype, mode="r", offset=shard.offset, shape=(shard.tokens,))
        return self._maps[index]

    def _map_marks(self, index: int) -> np.ndarray:
        if -1 - index not in self._maps:
            marks = self.shards[index].marks
            assert marks is not None
            self._maps[-1 - index] = np.memmap(marks, np.uint8, mode="r")
        return self._maps[-1 - index]


@dataclass(frozen=True)
class TokenShards:
    """A folder of token shards. `fingerprint` changes whenever a token does; `vocab_size` is None if unknown.

    Of several folders that are mixed, `source_tokens` are the training tokens of each, `weights` their shares.
    """

    folder: Path
    manifest: dict[str, Any]
    train: Tokens
    validation: Tokens | None
    fingerprint: str
    source_tokens: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def vocab_size(self) -> int | None:
        return self.manifest.get("vocab_size")

    @property
    def tokenizer_hash(self) -> str | None:
        return self.manifest.get("tokenizer_hash")

    @cached_property
    def tokenizer_dir(self) -> Path | None:
        folder = self.folder / "tokenizer"
        return folder if folder.is_dir() else None


def open_shards(folder: str | Path) -> TokenShards:
    """Open the prepared shards in `folder`, or nanoGPT's bins. Raises UserError if they are missing or damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of token shards; make one with `minigpt prepare`")
    if (folder / MANIFEST).is_file():
        return _open_manifest(folder)
    return _open_foreign(folder)


def _open_manifest(folder: Path) -> TokenShards:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise UserError(f"format is {manifest['format']!r}, not {FORMAT!r}")
        if manifest["version"] > FORMAT_VERSION:
            raise UserError(f"version {manifest['version']} is newer than this program reads ({FORMAT_VERSION})")
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        splits = {name: _open_split(folder, split, dtype) for name, split in manifest["splits"].items()}
        train = splits["train"]
        records = [shard for name in sorted(splits) for shard in manifest["splits"][name]["shards"]]
        hashes = [record["sha256"] for record in records] + [r["marks"]["sha256"] for r in records if "marks" in r]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: {reason}; prepare the data again") from error
    fingerprint = hashlib.sha256(":".join([manifest["dtype"], *hashes]).encode()).hexdigest()
    return TokenShards(folder, manifest, train, splits.get("validation"), fingerprint)


def _open_split(folder: Path, split: dict[str, Any], dtype: np.dtype) -> Tokens:
    shards = []
    for record in split["shards"]:
        path = folder / record["file"]
        _check_size(path, record["tokens"] * dtype.itemsize)
        marks = folder / record["marks"]["file"] if "marks" in record else None
        if marks:
            _check_size(marks, record["tokens"])
        shards.append(Shard(path, record["tokens"], marks=marks))
    return Tokens(shards, dtype, split["text_bytes"], split["documents"])


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise UserError(f"{path.name} is missing")
    if path.stat().st_size != expected:
        raise UserError(f"{path.name} has {path.stat().st_size} bytes where the manifest says {expected}")


def _open_foreign(folder: Path) -> TokenShards:
    """Shards of another program: without a manifest, the fingerprint is their sizes and a sample of their content."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".npy")]
    found = {
        "train": [_foreign_shard(path) for path in files if "train" in path.stem],
        "validation": [_foreign_shard(path) for path in files if "val" in path.stem],
    }
    if not found["train"]:
        raise UserError(
            f"{folder}: neither {MANIFEST} nor train.bin is there, nor other shards that are known "
            "(…train….npy, …train….bin); make them with `minigpt prepare`"
        )
    dtypes = sorted({dtype.str for shards in found.values() for _, dtype in shards})
    if len(dtypes) > 1:
        raise UserError(f"{folder}: shards of different types of ids ({', '.join(dtypes)}); keep them in two folders")
    digest = hashlib.sha256(dtypes[0].encode())
    splits = {}
    for name, shards in found.items():
        if shards:
            splits[name] = Tokens([shard for shard, _ in shards], np.dtype(dtypes[0]))
            digest.update(f"{name}:{[shard.tokens for shard, _ in shards]}:".encode())
            length = len(splits[name])
            for start in np.linspace(0, max(0, length - 4096), 16, dtype=np.int64):
                digest.update(splits[name].read(int(start), min(length, int(start) + 4096)).tobytes())
    return TokenShards(folder, {}, splits["train"], splits.get("validation"), digest.hexdigest())


def _foreign_shard(path: Path) -> tuple[Shard, np.dtype]:
    """Where the ids of a .npy file, a .bin file with llm.c's header or a bare .bin file are, and of which type."""
    size = path.stat().st_size
    if path.suffix == ".npy":
        shard, dtype = _npy_shard(path)
    else:
        header = np.fromfile(path, "<i4", count=3)
        llmc = LLMC_DTYPES.get((int(header[0]), int(header[1]))) if len(header) == 3 else None
        dtype = np.dtype(llmc or "<u2")
        offset = LLMC_HEADER_BYTES if llmc else 0
        shard = Shard(path, int(header[2]) if llmc else size // dtype.itemsize, offset)
    if shard.tokens <= 0 or size != shard.offset + shard.tokens * dtype.itemsize:
        raise UserError(
            f"{path}: {size} bytes are not a whole number of {dtype.name} token ids, or not as many as its header "
            "says; write the file again"
        )
    return shard, dtype


def _npy_shard(path: Path) -> tuple[Shard, np.dtype]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path}: not a .npy file of token ids: {error}") from error
    if array.ndim != 1 or array.dtype not in (np.dtype("<u2"), np.dtype("<u4"), np.dtype("<i4")):
        raise UserError(f"{path}: an array of {array.dtype} of shape {array.shape}, not a list of 16 or 32-bit ids")
    return Shard(path, len(array), array.offset), array.dtype
