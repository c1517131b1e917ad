"""Training samples: fixed-length blocks of tokens."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from minigpt.data.shards import ENDS_DOCUMENT, IN_LOSS, Tokens
from minigpt.modeling.loss import IGNORE_INDEX

Batch = dict[str, torch.Tensor]


class Samples(Dataset[Batch], ABC):
    """What a run learns from or is judged by: samples with a number each, read a batch at a time."""

    equal_targets: int | None = None  # targets with a loss in every sample, where they are as many in each
    text_bytes: int | None = None  # UTF-8 bytes that all targets together stand for; None if nobody knows

    def __getitem__(self, sample: int) -> Batch:
        return {name: rows[0] for name, rows in self.__getitems__([sample]).items()}

    @abstractmethod
    def __getitems__(self, samples: list[int]) -> Batch:
        """`input_ids` and `shift_labels`, both [B, T] int64, and `position_ids` where documents are kept apart."""

    @abstractmethod
    def targets(self, samples: Sequence[int]) -> int:
        """How many targets of these samples have a loss."""

    @abstractmethod
    def every(self) -> Sequence[int]:
        """Samples that hold every target once."""


class TokenBlocks(Samples):
    """Samples of T = `block_size` tokens, named by their first token: T inputs, and targets one token further on.

    With `end_of_text`, the id that ends a document, a batch also holds `position_ids` that restart behind it: the
    model then keeps the documents of a sample apart, in attention and in positions.
    """

    def __init__(self, tokens: Tokens, block_size: int, end_of_text: int | None = None) -> None:
        self.tokens, self.block_size, self.end_of_text = tokens, block_size, end_of_text
        if not tokens.marked:
            self.equal_targets, self.text_bytes = block_size, tokens.text_bytes

    def __getitems__(self, starts: list[int]) -> Batch:
        """A sample that the end of the text cuts short is padded with targets that have no loss."""
        width = self.block_size + 1
        rows = np.full((len(starts), width), IGNORE_INDEX, dtype=np.int64)
        for row, start in zip(rows, starts, strict=True):
            ids = self.tokens.read(start, min(start + width, len(self.tokens)))
            row[: len(ids)] = ids
        batch = torch.from_numpy(rows)
        # the padding of a sample that was cut short has to be a token that exists
        named = {"input_ids": batch[:, :-1].clamp(min=0), "shift_labels": batch[:, 1:].contiguous()}
        if self.tokens.marked or self.end_of_text is not None:
            marks = np.zeros((len(starts), width), dtype=np.uint8)
            for of, start in zip(marks, starts, strict=True):
                known = self.tokens.marks(start, min(start + width, len(self.tokens)), self.end_of_text)
                of[: len(known)] = known
            named["shift_labels"][torch.from_numpy(marks[:, 1:] & IN_LOSS == 0)] = IGNORE_INDEX
            if self.end_of_text is not None:
                named["position_ids"] = torch.from_numpy(document_positions(marks[:, :-1] & ENDS_DOCUMENT > 0))
        return named

    def targets(self, starts: Sequence[int]) -> int:
        marks = (self.tokens.marks(start + 1, start + 1 + self.block_size) for start in starts)
        return sum(int(np.count_nonzero(of & IN_LOSS)) for of in marks)

    def every(self) -> Sequence[int]:
        return range(0, len(self.tokens) - 1, self.block_size)


def document_positions(ends: np.ndarray) -> np.ndarray:
    """The position of every token in its own document; `ends` [B, T] tells which tokens are the last of theirs.

    A document that began before the row counts from the row's beginning.
    """
    places = np.arange(ends.shape[1])
    behind_an_end = np.zeros(ends.shape, dtype=bool)
    behind_an_end[:, 1:] = ends[:, :-1]
    return places - np.maximum.accumulate(np.where(behind_an_end, places, 0), axis=1)
