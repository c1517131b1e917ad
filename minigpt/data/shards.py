"""Read token shards: the files of one split as a single sequence of token ids.

A folder of shards contains:

    train-00000.bin  validation-00000.bin  …   token ids: uint16 if every id fits, else uint32
    train-00000.marks  …                       one byte per token (see IN_LOSS); only for examples with a loss mask
    manifest.json                              counts, hashes, and the tokenizer and source of the tokens
    tokenizer/                                 a folder for `AutoTokenizer.from_pretrained`

Shards of other programs are read as well: nanoGPT's `train.bin` and `val.bin`, build-nanogpt's `…train….npy` and
`…val….npy`, llm.c's `…train….bin` and `…val….bin` with a header. They have no manifest, so their tokenizer, hashes and
document counts are unknown.
"""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from minigpt.utils.errors import UserError
from minigpt.utils.files import read_json

FORMAT = "minigpt-token-shards"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
IN_LOSS, ENDS_DOCUMENT = 1, 2  # the bits of a mark: the token is a target; the token is the last of its document
READ_TOKENS = 1 << 22  # tokens in memory at a time where a whole split is read
LLMC_HEADER_BYTES = 1024
LLMC_DTYPES = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # by magic number and version: GPT-2's and Llama 3's ids


def smallest_dtype(vocab_size: int) -> np.dtype:
    """uint16 if every id below `vocab_size` fits, else uint32; little-endian.

    Raises UserError if `vocab_size` is not between 1 and 2^32.
    """
    if not 0 < vocab_size <= 2**32:
        raise UserError(f"vocab_size={vocab_size} does not fit 32-bit token ids; use a tokenizer with fewer ids")
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


@dataclass(frozen=True)
class Shard:
    """One file of `tokens` token ids that start at byte `offset`, and the file of their marks, if there is one."""

    path: Path
    tokens: int
    offset: int = 0
    marks: Path | None = None


class Tokens:
    """The token ids of one split, memory-mapped from any number of shards. Positions may exceed 32 bits.

    `text_bytes` are the UTF-8 bytes of the text, without end-of-text tokens; None if unknown, as `documents` may be.
    """

    def __init__(
        self, shards: list[Shard], dtype: np.dtype, text_bytes: int | None = None, documents: int | None = None
    ) -> None:
        self.shards = shards
        self.dtype = np.dtype(dtype)
        self.text_bytes = text_bytes
        self.documents = documents
        self._shard_ends = list(accumulate(shard.tokens for shard in shards))
        self._id_maps: dict[int, np.ndarray] = {}  # by index of the shard
        self._mark_maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self._shard_ends[-1] if self._shard_ends else 0

    def __getstate__(self) -> dict[str, Any]:
        # numpy would pickle the content of the maps; a worker process maps the files itself
        return {**self.__dict__, "_id_maps": {}, "_mark_maps": {}}

    @property
    def has_loss_mask(self) -> bool:
        """Whether some tokens may be outside the loss."""
        return any(shard.marks for shard in self.shards)

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy of the ids at positions [start, stop), of type `dtype`. Raises IndexError outside the split."""
        ids = np.empty(self._checked_length(start, stop), self.dtype)
        for shard, begin, place, length in self._spans(start, stop):
            ids[place : place + length] = self._ids_of_shard(shard)[begin : begin + length]
        return ids

    def marks(self, start: int, stop: int, end_of_text: int | None = None) -> np.ndarray:
        """The marks at positions [start, stop): uint8, bits IN_LOSS and ENDS_DOCUMENT. Raises IndexError as `read`.

        In a shard without marks every token is in the loss, and the id `end_of_text` ends a document.
        """
        marks = np.empty(self._checked_length(start, stop), np.uint8)
        for shard, begin, place, length in self._spans(start, stop):
            if self.shards[shard].marks:
                marks[place : place + length] = self._marks_of_shard(shard)[begin : begin + length]
            else:
                ids = self._ids_of_shard(shard)[begin : begin + length]
                marks[place : place + length] = IN_LOSS + ENDS_DOCUMENT * (
                    ids == (-1 if end_of_text is None else end_of_text)
                )
        return marks

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Bounds [start, stop) of consecutive blocks of READ_TOKENS tokens, to read a split of any size in parts."""
        for start in range(0, len(self), READ_TOKENS):
            yield start, min(len(self), start + READ_TOKENS)

    def document_bounds(self, end_of_text: int) -> np.ndarray:
        """The position of the first token of every document and, last, the length of the split: int64 [documents + 1].

        Document n has the positions [bounds[n], bounds[n + 1]). The last of them is its end of text, which only the
        last document may lack.
        """
        bounds_of_blocks = [np.zeros(1, dtype=np.int64)]
        for start, stop in self.blocks():
            ends = np.flatnonzero(self.marks(start, stop, end_of_text) & ENDS_DOCUMENT)
            bounds_of_blocks.append(start + 1 + ends)
        bounds = np.concatenate(bounds_of_blocks)
        return bounds if bounds[-1] == len(self) else np.append(bounds, len(self))

    def _checked_length(self, start: int, stop: int) -> int:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens [{start}, {stop}) are outside a split of {len(self)} tokens")
        return stop - start

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """[start, stop) cut at shards: (index of the shard, place in the shard, place in the result, length)."""
        shard, done = bisect_right(self._shard_ends, start), 0
        while start + done < stop:
            begin = start + done - (self._shard_ends[shard] - self.shards[shard].tokens)
            length = min(stop - start - done, self.shards[shard].tokens - begin)
            yield shard, begin, done, length
            shard, done = shard + 1, done + length

    def _ids_of_shard(self, index: int) -> np.ndarray:
        if index not in self._id_maps:
            shard = self.shards[index]
            self._id_maps[index] = np.memmap(
                shard.path, self.dtype, mode="r", offset=shard.offset, shape=(shard.tokens,)
            )
        return self._id_maps[index]

    def _marks_of_shard(self, index: int) -> np.ndarray:
        if index not in self._mark_maps:
            path = self.shards[index].marks
            assert path is not None
            self._mark_maps[index] = np.memmap(path, np.uint8, mode="r")
        return self._mark_maps[index]


@dataclass(frozen=True)
class TokenShards:
    """A folder of token shards, or several folders as one mixture.

    `fingerprint` changes with every token. `manifest` is empty for shards of other programs. For a mixture,
    `source_tokens` are the training tokens of each source and `weights` their shares of the samples.
    """

    folder: Path
    manifest: dict[str, Any]
    train: Tokens
    validation: Tokens | None
    fingerprint: str
    source_tokens: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def splits(self) -> dict[str, Tokens]:
        """The splits that exist, by name."""
        return {"train": self.train} | ({} if self.validation is None else {"validation": self.validation})

    @property
    def vocab_size(self) -> int | None:
        """One more than the largest possible id; None if unknown."""
        return self.manifest.get("vocab_size")

    @property
    def tokenizer_hash(self) -> str | None:
        """The hash of the tokenizer that made the shards; None if unknown."""
        return self.manifest.get("tokenizer_hash")

    @property
    def holds_conversations(self) -> bool:
        """Whether conversations were written by the tokenizer's chat template."""
        return self.manifest.get("conversations") is True

    @cached_property
    def tokenizer_dir(self) -> Path | None:
        """The folder of the tokenizer; None if the shards have none."""
        folder = self.folder / "tokenizer"
        return folder if folder.is_dir() else None


def open_shards(folder: str | Path) -> TokenShards:
    """Open the token shards in `folder`. Raises UserError if they are missing or damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of token shards; make one with `minigpt prepare`")
    if os.path.lexists(folder / MANIFEST):
        return _open_manifest(folder)
    return _open_without_manifest(folder)


def _open_manifest(folder: Path) -> TokenShards:
    path = folder / MANIFEST
    manifest = read_json(path, "a manifest of token shards; prepare the data again")
    try:
        if manifest["format"] != FORMAT:
            raise UserError(f"format is {manifest['format']!r}, not {FORMAT!r}")
        if manifest["version"] > FORMAT_VERSION:
            raise UserError(
                f"version {manifest['version']} is newer than {FORMAT_VERSION}, the newest that this program reads"
            )
        if manifest["dtype"] not in ("uint16", "uint32"):
            raise UserError(f"dtype is {manifest['dtype']!r}, not 'uint16' or 'uint32'")
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        splits = {name: _open_split(folder, split, dtype) for name, split in manifest["splits"].items()}
        train = splits["train"]
        records = [shard for name in sorted(splits) for shard in manifest["splits"][name]["shards"]]
        hashes = [record["sha256"] for record in records]
        hashes += [record["marks"]["sha256"] for record in records if "marks" in record]
        fingerprint = hashlib.sha256(":".join([manifest["dtype"], *hashes]).encode()).hexdigest()
        vocab_size, tokenizer_hash = manifest.get("vocab_size"), manifest.get("tokenizer_hash")
        if not isinstance(manifest.get("eos_token_id"), int | None):
            raise UserError(f"eos_token_id is {manifest['eos_token_id']!r}, not a token id")
        if vocab_size is not None and (type(vocab_size) is not int or vocab_size < 1):
            raise UserError(f"vocab_size is {vocab_size!r}, not a number above 0")
        if not isinstance(tokenizer_hash, str | None):
            raise UserError(f"tokenizer_hash is {tokenizer_hash!r}, not a text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: {reason}; prepare the data again") from error
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
    for name in ("text_bytes", "documents"):
        if not isinstance(split[name], int | None):
            raise UserError(f"{name} is {split[name]!r}, not a number")
    return Tokens(shards, dtype, split["text_bytes"], split["documents"])


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise UserError(f"{path.name} is missing")
    if path.stat().st_size != expected:
        raise UserError(f"{path.name} has {path.stat().st_size} bytes where the manifest says {expected}")


def _open_without_manifest(folder: Path) -> TokenShards:
    """Shards of another program. Their fingerprint is a hash of their sizes and of a sample of their content."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".npy") and path.is_file()]
    shards_of_split = {
        "train": [_shard_of_other_program(path) for path in files if "train" in path.stem],
        "validation": [_shard_of_other_program(path) for path in files if "val" in path.stem],
    }
    if not shards_of_split["train"]:
        raise UserError(
            f"{folder}: neither {MANIFEST} nor train.bin is there, nor shards under another known name "
            "(…train….npy, …train….bin); make them with `minigpt prepare`"
        )
    dtypes = sorted({dtype.str for shards in shards_of_split.values() for _, dtype in shards})
    if len(dtypes) > 1:
        raise UserError(f"{folder}: shards of different types of ids ({', '.join(dtypes)}); keep them in two folders")
    digest = hashlib.sha256(dtypes[0].encode())
    splits = {}
    for name, shards in shards_of_split.items():
        if shards:
            splits[name] = Tokens([shard for shard, _ in shards], np.dtype(dtypes[0]))
            digest.update(f"{name}:{[shard.tokens for shard, _ in shards]}:".encode())
            length = len(splits[name])
            for start in np.linspace(0, max(0, length - 4096), 16, dtype=np.int64):
                digest.update(splits[name].read(int(start), min(length, int(start) + 4096)).tobytes())
    return TokenShards(folder, {}, splits["train"], splits.get("validation"), digest.hexdigest())


def _shard_of_other_program(path: Path) -> tuple[Shard, np.dtype]:
    """The ids of a .npy file, of a .bin file with llm.c's header or of a bare .bin file, and their type."""
    size = path.stat().st_size
    if path.suffix == ".npy":
        shard, dtype = _npy_shard(path)
    else:
        header = np.fromfile(path, "<i4", count=3)
        llmc_dtype = LLMC_DTYPES.get((int(header[0]), int(header[1]))) if len(header) == 3 else None
        dtype = np.dtype(llmc_dtype or "<u2")
        offset = LLMC_HEADER_BYTES if llmc_dtype else 0
        shard = Shard(path, int(header[2]) if llmc_dtype else size // dtype.itemsize, offset)
    if shard.tokens <= 0 or size != shard.offset + shard.tokens * dtype.itemsize:
        raise UserError(
            f"{path}: {size} bytes are not a whole number of {dtype.name} token ids, or not the number in the file's "
            "header; write the file again"
        )
    return shard, dtype


def _npy_shard(path: Path) -> tuple[Shard, np.dtype]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path}: not a .npy file of token ids: {error}") from error
    if array.ndim != 1 or array.dtype not in (np.dtype("<u2"), np.dtype("<u4"), np.dtype("<i4")):
        raise UserError(f"{path}: an array of {array.dtype} of shape {array.shape}, not a list of 16 or 32-bit ids")
    if array.dtype.kind == "i":
        lowest = min(
            (int(array[start : start + READ_TOKENS].min()) for start in range(0, len(array), READ_TOKENS)), default=0
        )
        if lowest < 0:
            raise UserError(f"{path} holds token id {lowest}; ids are 0 or more, write the file again")
    return Shard(path, len(array), array.offset), array.dtype
