"""Find where a sequence of tokens occurs in a training text, and how far: a suffix array of the tokens.

libdivsufsort sorts all suffixes of the text (pydivsufsort, an extra). The longest copy of a sequence is then a binary
search away. Memory and disk: 4 bytes per token for the suffixes (8 from 2^30 tokens on) and 2 for the tokens (4 if the
vocabulary has more than 65,536 ids), mapped into memory. Building takes 24 or 28 bytes per token once.
"""

import shutil
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock

from minigpt.data.shards import Tokens, TokenShards
from minigpt.utils.errors import UserError
from minigpt.utils.files import fsync, publish_folder
from minigpt.utils.formatting import format_bytes
from minigpt.utils.resources import free_memory

LONGEST = 1024  # tokens; a longer copy is found as one of this length


class CopyIndex:
    """The index in `folder`, which `build_copy_index` has written."""

    def __init__(self, folder: Path) -> None:
        self._suffixes = np.load(folder / "suffixes.npy", mmap_mode="r", allow_pickle=False)
        tokens = np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
        self._bounds = np.load(folder / "document_bounds.npy", mmap_mode="r", allow_pickle=False)
        self._dtype = tokens.dtype  # big-endian, so that bytes compare as the tokens do
        self._text = memoryview(tokens.view(np.uint8))

    def longest_copies(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each place of `ids`: the length of the longest copy that starts there, and the position of one.

        Both int64 [len(ids)]. The position is that of a token of the training text.
        """
        lengths, positions = np.zeros(len(ids), dtype=np.int64), np.zeros(len(ids), dtype=np.int64)
        query = ids.astype(self._dtype).tobytes()
        for place in range(len(ids)):
            lengths[place], positions[place] = self._longest_copy(query[place * self._dtype.itemsize :])
        return lengths, positions

    def occurrences(self, ids: np.ndarray) -> int:
        """How often `ids` are in the training text."""
        query = ids.astype(self._dtype).tobytes()
        bounds = (bisect(self._suffixes, query, key=self._beginning(query)) for bisect in (bisect_left, bisect_right))
        first, end = bounds
        return end - first

    def document_of(self, position: int) -> tuple[int, int]:
        """The number of the document that holds a position, and the position of its first token."""
        document = int(np.searchsorted(self._bounds, position, side="right")) - 1
        return document, int(self._bounds[document])

    def _longest_copy(self, query: bytes) -> tuple[int, int]:
        query = query[: LONGEST * self._dtype.itemsize]
        low = bisect_left(self._suffixes, query, key=self._beginning(query))  # the first suffix not before the query
        best = 0, 0
        for neighbour in (low - 1, low):
            if 0 <= neighbour < len(self._suffixes):
                position = int(self._suffixes[neighbour])
                best = max(best, (self._common_tokens(query, self._at(position, len(query))), position))
        return best

    def _beginning(self, query: bytes) -> Callable[[np.integer], bytes]:
        """What a suffix is compared by: as many of its bytes as the query has."""
        return lambda suffix: self._at(int(suffix), len(query))

    def _at(self, position: int, size: int) -> bytes:
        start = position * self._dtype.itemsize
        return bytes(self._text[start : start + size])

    def _common_tokens(self, first: bytes, second: bytes) -> int:
        tokens = [np.frombuffer(text, self._dtype) for text in (first, second)]
        length = min(map(len, tokens))
        differs = np.flatnonzero(tokens[0][:length] != tokens[1][:length])
        return int(differs[0]) if len(differs) else length


def index_folder(cache: Path, shards: TokenShards) -> Path:
    """Where the index of the training tokens is kept in a cache folder."""
    return cache / f"copies-{shards.fingerprint[:32]}"


def building_bytes(tokens: Tokens) -> int:
    """The memory that building takes: 20 bytes per token to sort, 40 with 64-bit positions, and the tokens twice."""
    sorting = 20 if len(tokens) * tokens.dtype.itemsize < 2**31 else 40
    return len(tokens) * (sorting + 2 * tokens.dtype.itemsize)


def build_copy_index(tokens: Tokens, end_of_text: int, folder: Path) -> CopyIndex:
    """The index of a split, kept in `folder`. Of the processes that need it, the first builds it; others wait.

    Raises UserError if pydivsufsort is not installed, or the memory does not suffice.
    """
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                _write(tokens, end_of_text, folder)
    return CopyIndex(folder)


def _write(tokens: Tokens, end_of_text: int, folder: Path) -> None:
    try:
        from pydivsufsort import divsufsort
    except ImportError as error:
        raise UserError("the index needs pydivsufsort: pip install 'minigpt-lm[memorization]'") from error
    needed, free = building_bytes(tokens), free_memory()
    if needed > free:
        raise UserError(
            f"the index of {len(tokens):,} tokens takes {format_bytes(needed)} of memory while it is built, but "
            f"{format_bytes(free)} are free; build it on a larger machine: minigpt memorization"
        )
    unfinished = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    ids = tokens.read(0, len(tokens))
    arrays = {
        "suffixes": divsufsort(ids.astype(tokens.dtype.newbyteorder("="))),
        "tokens": ids.astype(tokens.dtype.newbyteorder(">")),
        "document_bounds": tokens.document_bounds(end_of_text),
    }
    for name, array in arrays.items():
        np.save(unfinished / f"{name}.npy", array)
        fsync(unfinished / f"{name}.npy")
    publish_folder(unfinished, folder)
