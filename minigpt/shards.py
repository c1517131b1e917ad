"""What do tokens look like on disk? A folder of raw little-endian shards and a manifest that lets anyone check them.

    train-00000.bin  validation-00000.bin  …   uint16 if every id fits, else uint32
    manifest.json                              counts, hashes, tokenizer and source of the above
    tokenizer/                                 what `AutoTokenizer.from_pretrained` reads

nanoGPT's lone `train.bin` and `val.bin` are read as they are.
"""

import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "minigpt-token-shards"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SHARD_TOKENS = 100_000_000
NANOGPT_FILES = {"train": "train.bin", "validation": "val.bin"}


def smallest_dtype(vocab_size: int) -> np.dtype:
    """uint16 when every id below `vocab_size` fits, else uint32; little-endian either way."""
    if not 0 < vocab_size <= 2**32:
        raise ValueError(f"vocab_size={vocab_size} does not fit 32-bit token ids")
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


@dataclass(frozen=True)
class Shard:
    """One file of token ids: `tokens` ids from byte `offset` on."""

    path: Path
    tokens: int
    offset: int = 0


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

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy of the ids at positions [start, stop), across shards. Raises IndexError outside the split."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens [{start}, {stop}) are outside a split of {len(self)} tokens")
        out = np.empty(stop - start, self.dtype)
        done = 0
        index = bisect_right(self._ends, start)
        while done < len(out):
            begin = start + done - (self._ends[index] - self.shards[index].tokens)
            part = self._map(index)[begin : begin + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)
            index += 1
        return out

    def _map(self, index: int) -> np.ndarray:
        if index not in self._maps:
            shard = self.shards[index]
            self._maps[index] = np.memmap(shard.path, self.dtype, mode="r", offset=shard.offset, shape=(shard.tokens,))
        return self._maps[index]


@dataclass(frozen=True)
class TokenShards:
    """A folder of token shards. `fingerprint` changes whenever a token does; `vocab_size` is None if unknown."""

    folder: Path
    manifest: dict[str, Any]
    train: Tokens
    validation: Tokens | None
    fingerprint: str

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
    """Open the prepared shards in `folder`, or nanoGPT's bins. Raises ValueError if they are missing or damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of token shards; make one with `minigpt prepare`")
    if (folder / MANIFEST).is_file():
        return _open_manifest(folder)
    if (folder / NANOGPT_FILES["train"]).is_file():
        return _open_nanogpt(folder)
    raise ValueError(f"{folder}: neither {MANIFEST} nor train.bin is there; make them with `minigpt prepare`")


def _open_manifest(folder: Path) -> TokenShards:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format is {manifest['format']!r}, not {FORMAT!r}")
        if manifest["version"] > FORMAT_VERSION:
            raise ValueError(f"version {manifest['version']} is newer than this program reads ({FORMAT_VERSION})")
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        splits = {name: _open_split(folder, split, dtype) for name, split in manifest["splits"].items()}
        train = splits["train"]
        hashes = [shard["sha256"] for name in sorted(splits) for shard in manifest["splits"][name]["shards"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: {reason}; prepare the data again") from error
    fingerprint = hashlib.sha256(":".join([manifest["dtype"], *hashes]).encode()).hexdigest()
    return TokenShards(folder, manifest, train, splits.get("validation"), fingerprint)


def _open_split(folder: Path, split: dict[str, Any], dtype: np.dtype) -> Tokens:
    shards = []
    for record in split["shards"]:
        path = folder / record["file"]
        _check_size(path, record["tokens"] * dtype.itemsize)
        shards.append(Shard(path, record["tokens"]))
    return Tokens(shards, dtype, split["text_bytes"], split["documents"])


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    if path.stat().st_size != expected:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes where the manifest says {expected}")


def _open_nanogpt(folder: Path) -> TokenShards:
    """nanoGPT's uint16 files: no manifest, so the fingerprint is their sizes and a sample of their content."""
    dtype = np.dtype("<u2")
    digest = hashlib.sha256(dtype.str.encode())
    splits = {}
    for name, file in NANOGPT_FILES.items():
        path = folder / file
        if not path.is_file():
            continue
        size = path.stat().st_size
        if size == 0 or size % dtype.itemsize:
            raise ValueError(f"{path}: {size} bytes are not a whole number of uint16 token ids; write the file again")
        splits[name] = Tokens([Shard(path, size // dtype.itemsize)], dtype)
        digest.update(f"{name}:{size}:".encode())
        length = len(splits[name])
        for start in np.linspace(0, max(0, length - 4096), 16, dtype=np.int64):
            digest.update(splits[name].read(int(start), min(length, int(start) + 4096)).tobytes())
    return TokenShards(folder, {}, splits["train"], splits.get("validation"), digest.hexdigest())


@dataclass
class SplitRecord:
    """What the manifest says about one split."""

    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class SplitWriter:
    """Writes one split as shards of at most `shard_tokens` ids into an existing folder, a few ids in memory at a time.

    A shard file is complete, and on the disk, before the next one begins.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.record = SplitRecord()
        self._room = 0
        self._file: Any = None
        self._digest = hashlib.sha256()

    def write(self, ids: np.ndarray, documents: int, text_bytes: int) -> None:
        """Append token ids, which hold the ends of `documents` documents and `text_bytes` of their text."""
        if len(ids) and int(ids.max()) > np.iinfo(self.dtype).max:
            raise ValueError(f"token id {int(ids.max())} does not fit {self.dtype.name}")
        ids = ids.astype(self.dtype, copy=False)
        self.record.tokens += len(ids)
        self.record.documents += documents
        self.record.text_bytes += text_bytes
        while len(ids):
            if not self._room:
                self._start_shard()
            part, ids = ids[: self._room], ids[self._room :]
            self._file.write(part.tobytes())
            self._digest.update(part.tobytes())
            self._room -= len(part)
            self.record.shards[-1]["tokens"] += len(part)
            if not self._room:
                self._end_shard()

    def close(self) -> SplitRecord:
        """Finish the last shard and say what was written."""
        self._end_shard()
        return self.record

    def _start_shard(self) -> None:
        name = f"{self.split}-{len(self.record.shards):05d}.bin"
        self.record.shards.append({"file": name, "tokens": 0})
        self._file = (self.folder / name).open("wb")
        self._digest = hashlib.sha256()
        self._room = self.shard_tokens

    def _end_shard(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file, self._room = None, 0
            self.record.shards[-1]["sha256"] = self._digest.hexdigest()


def write_manifest(
    folder: Path, dtype: np.dtype, vocab_size: int, splits: dict[str, SplitRecord], **about: Any
) -> dict[str, Any]:
    """Write `manifest.json` beside the shards; `about` says where the tokens come from (tokenizer_hash, source, …)."""
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "dtype": dtype.name,
        "vocab_size": vocab_size,
        **about,
        "splits": {name: record.as_dict() for name, record in splits.items()},
    }
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=2, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    return manifest


@contextmanager
def appearing_folder(final: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `final` that takes its name when the block ends well, and vanishes when it does not.

    With `replace`, what was in `final` is kept until then and deleted afterwards.
    """
    missing = [folder for folder in final.parents if not folder.exists()]
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.parent / f".{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if final.is_dir() and not any(final.iterdir()):
            final.rmdir()
        elif final.is_dir() and replace:
            old = temporary.with_suffix(".old")
            final.rename(old)
            temporary.rename(final)
            shutil.rmtree(old, ignore_errors=True)
            return
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in missing:  # made for nothing: take them away again, innermost first
            with suppress(OSError):
                folder.rmdir()
        raise
