"""Pack whole documents into rows of `block_size` tokens.

A document of n tokens takes n - 1 places of a row: its last token, the end of text, is only a target. Its attention
and positions are its own, and no target is beyond its end, so it has the loss that it has alone.

What is longer than a row is cut at its end ("bfd", "none") or goes on in another piece that shares the one token at
which it was cut ("bfd_split"), as TRL does under these names.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from minigpt.data.samples import Batch, Samples
from minigpt.data.shards import ENDS_DOCUMENT, IN_LOSS, Tokens
from minigpt.modeling.loss import IGNORE_INDEX
from minigpt.utils.errors import UserError

READ_TOKENS = 1 << 22

Strategy = Literal["bfd", "bfd_split", "none"]


class PackedDocuments(Samples):
    """Rows of whole documents. Rows of several sources stand one after the other, and none holds two sources.

    Memory: about 20 bytes a document. Raises UserError when a source has no document with a target.
    """

    def __init__(
        self,
        tokens: Tokens,
        block_size: int,
        end_of_text: int,
        strategy: Strategy,
        source_tokens: Sequence[int] | None = None,
    ) -> None:
        self.tokens, self.block_size, self.strategy, self.padded = tokens, block_size, strategy, strategy == "none"
        ends = np.cumsum(source_tokens if source_tokens is not None else [len(tokens)])
        bounds = np.union1d(document_bounds(tokens, end_of_text), ends)
        self.documents = len(bounds) - 1
        self.cut = int((np.diff(bounds) - 1 > block_size).sum())  # documents that do not fit a row
        starts, sizes = pieces(bounds, block_size, split=strategy == "bfd_split")
        rows = np.empty(len(starts), dtype=np.int64)
        self.source_rows: list[int] = []
        first = 0
        for last in np.searchsorted(starts, ends):
            own = sizes[first:last]
            if not len(own):
                raise UserError(
                    "no document of the text has two tokens, so there is nothing to foresee; give more text"
                )
            filled = np.arange(len(own)) if self.padded else best_fit(own, block_size)
            rows[first:last] = filled + sum(self.source_rows)
            self.source_rows.append(int(filled.max()) + 1)
            first = last
        by_row = np.argsort(rows, kind="stable")  # documents of a row in the order of the text
        self.starts, self.sizes = starts[by_row], sizes[by_row]
        self.bounds = np.concatenate([[0], np.cumsum(np.bincount(rows))])  # of each row in the two above
        self.row_targets = np.add.reduceat(self._targets_of_pieces(), self.bounds[:-1]).astype(np.int32)
        if not self.row_targets.any():
            raise UserError(
                f"every prompt is longer than block_size={block_size}, so no completion is learned; raise it"
            )

    def _targets_of_pieces(self) -> np.ndarray:
        if not self.tokens.marked:
            return self.sizes
        in_order = np.argsort(self.starts)
        starts = self.starts[in_order]
        counts = np.empty(len(starts), dtype=np.int64)
        counts[in_order] = targets_before(self.tokens, starts + self.sizes[in_order] + 1) - targets_before(
            self.tokens, starts + 1
        )
        return counts

    def __getitems__(self, rows: list[int]) -> Batch:
        """[B, T]: rows of `block_size`, or one document each, then as wide as the longest; padding has no loss."""
        spans = [range(self.bounds[row], self.bounds[row + 1]) for row in rows]
        width = max(int(self.sizes[span.start]) for span in spans) if self.padded else self.block_size
        ids = np.zeros((len(rows), width), dtype=np.int64)
        labels = np.full((len(rows), width), IGNORE_INDEX, dtype=np.int64)
        positions = np.empty((len(rows), width), dtype=np.int64)
        for row, span in enumerate(spans):
            at = 0
            for piece in span:
                start, end = int(self.starts[piece]), at + int(self.sizes[piece])
                stop = start + end - at + 1
                document = self.tokens.read(start, stop).astype(np.int64)
                ids[row, at:end] = document[:-1]
                labels[row, at:end] = document[1:]
                if self.tokens.marked:
                    labels[row, at:end][self.tokens.marks(start + 1, stop) & IN_LOSS == 0] = IGNORE_INDEX
                positions[row, at:end] = np.arange(end - at)
                at = end
            positions[row, at:] = np.arange(width - at)  # padding is a document of its own
        batch = {"input_ids": torch.from_numpy(ids), "shift_labels": torch.from_numpy(labels)}
        return batch if self.padded else batch | {"position_ids": torch.from_numpy(positions)}

    def targets(self, rows: Sequence[int]) -> int:
        return int(self.row_targets[rows].sum())

    def every(self) -> Sequence[int]:
        return range(len(self.row_targets))

    def __str__(self) -> str:
        places = len(self.row_targets) * self.block_size
        filled = "" if self.padded else f", {self.sizes.sum() / places:.1%} filled"
        fate = "go on in another one" if self.strategy == "bfd_split" else "are cut at its end"
        cut = f"; {self.cut:,} documents are longer than a row and {fate}" if self.cut else ""
        return f"{self.documents:,} documents in {len(self.row_targets):,} rows{filled}{cut}"


def document_bounds(tokens: Tokens, end_of_text: int) -> np.ndarray:
    """The first position of every document and, last, the end of the last one: int64 [documents + 1]."""
    found = [np.zeros(1, dtype=np.int64)]
    for start in range(0, len(tokens), READ_TOKENS):
        marks = tokens.marks(start, min(len(tokens), start + READ_TOKENS), end_of_text)
        found.append(start + 1 + np.flatnonzero(marks & ENDS_DOCUMENT))
    bounds = np.concatenate(found)
    return bounds if bounds[-1] == len(tokens) else np.append(bounds, len(tokens))


def pieces(bounds: np.ndarray, block_size: int, split: bool) -> tuple[np.ndarray, np.ndarray]:
    """First tokens (int64) and sizes in places of a row (int32) of what is packed; what has no target is left out."""
    sizes = np.diff(bounds) - 1
    if not split:
        kept = sizes > 0
        return bounds[:-1][kept], np.minimum(sizes[kept], block_size).astype(np.int32)
    number = -(-sizes // block_size)
    place = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)  # of a piece in its document
    starts = np.repeat(bounds[:-1], number) + place * block_size
    return starts, np.minimum(np.repeat(sizes, number) - place * block_size, block_size).astype(np.int32)


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The row of every piece by best-fit decreasing: the longest first, each where the least room that suffices is.

    Pieces of one size are dealt out together, so this takes time by the number of sizes rather than of pieces: into a
    row with room r go as many pieces of size s as fit, since the rest of its room stays the least that suffices.
    """
    rows = np.empty(len(sizes), dtype=np.int64)
    by_size = np.argsort(-sizes.astype(np.int64), kind="stable")
    rooms: list[int] = []  # that some row has, ascending
    rows_with: dict[int, list[np.ndarray]] = {}
    made = 0

    def put_back(room: int, those: np.ndarray) -> None:
        if len(those) and room:
            if room not in rows_with:
                insort(rooms, room)
            rows_with.setdefault(room, []).append(those)

    at = 0
    ordered = sizes[by_size]
    while at < len(ordered):
        size = int(ordered[at])
        left = int(np.searchsorted(-ordered, -size, side="right")) - at
        while left:
            place = bisect_left(rooms, size)
            if place < len(rooms):
                room = rooms.pop(place)
                open_rows = np.concatenate(rows_with.pop(room))
            else:
                room, open_rows = capacity, np.arange(made, made + -(-left // (capacity // size)))
                made += len(open_rows)
            each = room // size
            full = min(len(open_rows), left // each)
            rest = left - full * each if full < len(open_rows) else 0
            dealt = np.append(np.repeat(open_rows[:full], each), np.repeat(open_rows[full : full + 1], rest))
            rows[by_size[at : at + len(dealt)]] = dealt
            put_back(room - each * size, open_rows[:full])
            put_back(room - rest * size, open_rows[full : full + 1])
            put_back(room, open_rows[full + 1 :])
            at, left = at + len(dealt), left - len(dealt)
    return rows


def targets_before(tokens: Tokens, positions: np.ndarray) -> np.ndarray:
    """How many targets stand before each of the ascending `positions`."""
    counts = np.empty(len(positions), dtype=np.int64)
    before = done = 0
    for start in range(0, len(tokens), READ_TOKENS):
        stop = min(len(tokens), start + READ_TOKENS)
        running = np.concatenate([[0], np.cumsum(tokens.marks(start, stop) & IN_LOSS)])
        last = int(np.searchsorted(positions, stop, side="right"))
        counts[done:last] = before + running[positions[done:last] - start]
        before, done = before + int(running[-1]), last
    return counts
