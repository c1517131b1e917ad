"""Pack whole documents into rows of `block_size` tokens.

A document of n tokens takes n - 1 places of a row, because its last token, the end of text, is only a target. The
documents of a row do not see each other, and the last target of a document is its own end, so every document has the
loss that it has alone.

Documents longer than a row are truncated ("bfd", "none") or continue as further pieces, each of which starts with the
last target of the piece before it ("bfd_split"). The names of the strategies are TRL's.
"""

import shutil
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from filelock import FileLock

from minigpt.data.samples import Batch, Samples
from minigpt.data.shards import IN_LOSS, Tokens
from minigpt.modeling.loss import IGNORE_INDEX
from minigpt.utils.errors import UserError
from minigpt.utils.files import fsync, publish_folder

Strategy = Literal["bfd", "bfd_split", "none"]


@dataclass(frozen=True)
class Packing:
    """Which pieces of documents are in which row. The pieces of row r are row_bounds[r] … row_bounds[r + 1] - 1."""

    starts: np.ndarray  # the position of the first token of every piece
    sizes: np.ndarray  # the places that every piece takes
    row_bounds: np.ndarray  # [rows + 1]
    row_targets: np.ndarray  # targets in the loss of every row
    source_rows: np.ndarray  # rows of every source of a mixture
    counts: np.ndarray  # documents, of them cut, and of them without a target in the loss because they are cut

    def save(self, folder: Path) -> None:
        """Write the arrays into a new folder."""
        unfinished = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for field in fields(self):
            np.save(unfinished / f"{field.name}.npy", getattr(self, field.name))
            fsync(unfinished / f"{field.name}.npy")
        publish_folder(unfinished, folder)

    @classmethod
    def load(cls, folder: Path) -> "Packing":
        """Map the arrays into memory, which all processes of a host share."""
        arrays = {
            field.name: np.load(folder / f"{field.name}.npy", mmap_mode="r", allow_pickle=False)
            for field in fields(cls)
        }
        return cls(**arrays)


def pack(
    tokens: Tokens, block_size: int, end_of_text: int, strategy: Strategy, source_tokens: Sequence[int] | None = None
) -> Packing:
    """Find the documents and put them into rows. It reads all tokens.

    `source_tokens` are the training tokens of every source of a mixture. No row holds documents of two sources; the
    rows of the first source come first.

    Raises UserError if a source has no document with a target, or if truncation leaves no target in the loss.
    """
    source_ends = np.cumsum(source_tokens if source_tokens is not None else [len(tokens)])
    bounds = np.union1d(tokens.document_bounds(end_of_text), source_ends)
    starts, sizes = pieces(bounds, block_size, split=strategy == "bfd_split")
    rows, source_rows = _rows_of_pieces(sizes, np.searchsorted(starts, source_ends), block_size, strategy)
    by_row = np.argsort(rows, kind="stable")  # the pieces of a row stay in the order of the text
    starts, sizes = starts[by_row], sizes[by_row]
    row_bounds = np.concatenate([[0], np.cumsum(np.bincount(rows))])  # the first piece of every row
    targets = _targets_of_pieces(tokens, starts, sizes)
    row_targets = np.add.reduceat(targets, row_bounds[:-1]).astype(np.int32)
    if not row_targets.any():
        raise UserError(
            f"block_size={block_size} is shorter than every prompt, so no completion is in the loss; try a larger "
            "block_size"
        )
    cut = int((np.diff(bounds) - 1 > block_size).sum())
    without_targets = 0 if strategy == "bfd_split" else int((targets == 0).sum())
    counts = np.array([len(bounds) - 1, cut, without_targets])
    return Packing(starts, sizes, row_bounds, row_targets, np.array(source_rows), counts)


def kept_packing(folder: Path, compute: Callable[[], Packing]) -> Packing:
    """What `compute` returns, kept in `folder`. Of the processes that need it, the first computes it; others wait."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                compute().save(folder)
    return Packing.load(folder)


def _rows_of_pieces(
    sizes: np.ndarray, source_ends: np.ndarray, block_size: int, strategy: Strategy
) -> tuple[np.ndarray, list[int]]:
    """The row of every piece, and the number of rows of every source; `source_ends` are the ends of its pieces."""
    rows = np.empty(len(sizes), dtype=np.int64)
    source_rows: list[int] = []
    first = 0
    for end in source_ends:
        source_sizes = sizes[first:end]
        if not len(source_sizes):
            raise UserError("no document of the text has two tokens, so there is no target; give more text")
        own_rows = np.arange(len(source_sizes)) if strategy == "none" else best_fit(source_sizes, block_size)
        rows[first:end] = own_rows + sum(source_rows)
        source_rows.append(int(own_rows.max()) + 1)
        first = end
    return rows, source_rows


def _targets_of_pieces(tokens: Tokens, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The number of targets in the loss of every piece: [pieces]."""
    if not tokens.has_loss_mask:
        return sizes
    in_text_order = np.argsort(starts)
    starts, sizes = starts[in_text_order], sizes[in_text_order]
    counts = np.empty(len(starts), dtype=np.int64)
    counts[in_text_order] = targets_before(tokens, starts + sizes + 1) - targets_before(tokens, starts + 1)
    return counts


class PackedDocuments(Samples):
    """Rows of whole documents; the sample id is the index of the row.

    With the strategy "none", a row holds one document. Memory: about 20 bytes per document.
    """

    def __init__(self, tokens: Tokens, block_size: int, strategy: Strategy, packing: Packing) -> None:
        self.tokens, self.block_size, self.strategy, self.packing = tokens, block_size, strategy, packing
        self.one_per_row = strategy == "none"
        self.documents, self.documents_cut, self.documents_without_targets = map(int, packing.counts)

    def __getitems__(self, rows: list[int]) -> Batch:
        """A batch. T is `block_size`, or the longest document of the batch if a row holds one document.

        Padding is not in the loss. `position_ids` count from 0 in every document; a row with one document has none.
        """
        piece_ranges = [range(self.packing.row_bounds[row], self.packing.row_bounds[row + 1]) for row in rows]
        width = (
            max(int(self.packing.sizes[row.start]) for row in piece_ranges) if self.one_per_row else self.block_size
        )
        ids = np.zeros((len(rows), width), dtype=np.int64)
        labels = np.full((len(rows), width), IGNORE_INDEX, dtype=np.int64)
        positions = np.empty((len(rows), width), dtype=np.int64)
        for row, piece_range in enumerate(piece_ranges):
            filled = 0
            for piece in piece_range:
                start, size = int(self.packing.starts[piece]), int(self.packing.sizes[piece])
                place = slice(filled, filled + size)
                document = self.tokens.read(start, start + size + 1).astype(np.int64)
                ids[row, place] = document[:-1]
                labels[row, place] = document[1:]
                if self.tokens.has_loss_mask:
                    marks = self.tokens.marks(start + 1, start + size + 1)
                    labels[row, place][marks & IN_LOSS == 0] = IGNORE_INDEX
                positions[row, place] = np.arange(size)
                filled += size
            positions[row, filled:] = np.arange(width - filled)  # padding counts as one more document
        batch = {"input_ids": torch.from_numpy(ids), "shift_labels": torch.from_numpy(labels)}
        return batch if self.one_per_row else batch | {"position_ids": torch.from_numpy(positions)}

    def target_count(self, rows: Sequence[int]) -> int:
        return int(self.packing.row_targets[rows].sum())

    def full_pass(self) -> Sequence[int]:
        return range(len(self.packing.row_targets))

    def __str__(self) -> str:
        places = len(self.packing.row_targets) * self.block_size
        fill = "" if self.one_per_row else f", {self.packing.sizes.sum() / places:.1%} filled"
        effect = "continue in another row" if self.strategy == "bfd_split" else "are truncated"
        cut = f"; {self.documents_cut:,} documents are longer than a row and {effect}" if self.documents_cut else ""
        if self.documents_without_targets:
            cut += f", {self.documents_without_targets:,} of them before the first token in the loss"
        return f"{self.documents:,} documents in {len(self.packing.row_targets):,} rows{fill}{cut}"


def pieces(bounds: np.ndarray, block_size: int, split: bool) -> tuple[np.ndarray, np.ndarray]:
    """The position of the first token (int64 [pieces]) and the places in a row (int32 [pieces]) of every piece.

    A piece with n places has n inputs and n targets, that is n + 1 tokens. A document is one piece of at most
    `block_size` places, or with `split`, as many as it needs. A document of one token has no target and no piece.
    `bounds` is int64 [documents + 1], as `Tokens.document_bounds` returns it.
    """
    targets = np.diff(bounds) - 1
    if not split:
        has_target = targets > 0
        return bounds[:-1][has_target], np.minimum(targets[has_target], block_size).astype(np.int32)
    counts = -(-targets // block_size)
    index_in_document = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(bounds[:-1], counts) + index_in_document * block_size
    remaining = np.repeat(targets, counts) - index_in_document * block_size
    return starts, np.minimum(remaining, block_size).astype(np.int32)


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The row of every piece by best-fit decreasing: int64 [pieces], for sizes from 1 to `capacity`.

    The longest piece comes first, and each goes into the row with the least room that suffices. Pieces of one size are
    placed together, so the time depends on the number of sizes rather than of pieces: a row with room r takes as many
    pieces of size s as fit, since its room remains the least that suffices until then.
    """
    rows = np.empty(len(sizes), dtype=np.int64)
    by_size = np.argsort(-sizes.astype(np.int64), kind="stable")
    ordered = sizes[by_size]
    rooms: list[int] = []  # the distinct rooms of the rows that are not full, ascending
    rows_by_room: dict[int, list[np.ndarray]] = {}
    row_count = 0

    def put_back(room: int, rows_with_room: np.ndarray) -> None:
        if len(rows_with_room) and room:
            if room not in rows_by_room:
                insort(rooms, room)
            rows_by_room.setdefault(room, []).append(rows_with_room)

    placed = 0
    while placed < len(ordered):
        size = int(ordered[placed])
        remaining = int(np.searchsorted(-ordered, -size, side="right")) - placed  # pieces of this size
        while remaining:
            index = bisect_left(rooms, size)
            if index < len(rooms):
                room = rooms.pop(index)
                candidates = np.concatenate(rows_by_room.pop(room))
            else:
                room = capacity
                candidates = np.arange(row_count, row_count + -(-remaining // (capacity // size)))
                row_count += len(candidates)
            per_row = room // size
            full_rows = min(len(candidates), remaining // per_row)  # that take as many pieces as fit
            rest = remaining - full_rows * per_row if full_rows < len(candidates) else 0  # for one row more
            assigned = np.append(
                np.repeat(candidates[:full_rows], per_row), np.repeat(candidates[full_rows : full_rows + 1], rest)
            )
            rows[by_size[placed : placed + len(assigned)]] = assigned
            put_back(room - per_row * size, candidates[:full_rows])
            put_back(room - rest * size, candidates[full_rows : full_rows + 1])
            put_back(room, candidates[full_rows + 1 :])
            placed += len(assigned)
            remaining -= len(assigned)
    return rows


def targets_before(tokens: Tokens, positions: np.ndarray) -> np.ndarray:
    """How many tokens in the loss are before each of the ascending `positions`: int64 [positions]."""
    counts = np.empty(len(positions), dtype=np.int64)
    total = done = 0
    for start, stop in tokens.blocks():
        running = np.concatenate([[0], np.cumsum(tokens.marks(start, stop) & IN_LOSS)])
        end = int(np.searchsorted(positions, stop, side="right"))
        counts[done:end] = total + running[positions[done:end] - start]
        total, done = total + int(running[-1]), end
    return counts
