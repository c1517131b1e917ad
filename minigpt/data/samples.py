"""Samples as tensors: inputs and targets of the model, read a batch at a time.

Shapes: B samples of a batch, T = `block_size` tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from minigpt.data.shards import ENDS_DOCUMENT, IN_LOSS, Tokens
from minigpt.modeling.loss import IGNORE_INDEX

Batch = dict[str, torch.Tensor]


class Samples(Dataset[Batch], ABC):
    """The samples of one split, by sample id."""

    targets_per_sample: int | None = None  # targets in the loss, if every sample has equally many
    text_bytes: int | None = None  # UTF-8 bytes of text that all targets together encode; None if unknown

    def __getitem__(self, sample_id: int) -> Batch:
        """One sample; tensors as in a batch, without the first dimension."""
        return {name: rows[0] for name, rows in self.__getitems__([sample_id]).items()}

    @abstractmethod
    def __getitems__(self, sample_ids: list[int]) -> Batch:
        """A batch: `input_ids` and `shift_labels`, both int64 [B, T], and `position_ids` if documents are separated.

        `shift_labels[b, t]` is the token after `input_ids[b, t]`, or IGNORE_INDEX if it is not in the loss.
        """

    @abstractmethod
    def target_count(self, sample_ids: Sequence[int]) -> int:
        """Number of targets in the loss of these samples, computed without reading a batch."""

    @abstractmethod
    def full_pass(self) -> Sequence[int]:
        """The ids of samples that together contain every target exactly once."""


class TokenBlocks(Samples):
    """Samples of T consecutive tokens; the sample id is the position of the first one.

    With `end_of_text`, the id that ends a document, a batch also has `position_ids` that restart after it. The model
    then keeps the documents of a sample apart, in attention and in positions.
    """

    def __init__(self, tokens: Tokens, block_size: int, end_of_text: int | None = None) -> None:
        self.tokens, self.block_size, self.end_of_text = tokens, block_size, end_of_text
        if not tokens.has_loss_mask:
            self.targets_per_sample, self.text_bytes = block_size, tokens.text_bytes

    def __getitems__(self, starts: list[int]) -> Batch:
        """A batch. A sample at the end of the split may be shorter: it is padded with targets outside the loss."""
        width = self.block_size + 1
        rows = np.full((len(starts), width), IGNORE_INDEX, dtype=np.int64)
        for row, start in zip(rows, starts, strict=True):
            ids = self.tokens.read(start, min(start + width, len(self.tokens)))
            row[: len(ids)] = ids
        ids_and_padding = torch.from_numpy(rows)
        batch = {
            "input_ids": ids_and_padding[:, :-1].clamp(min=0),  # an embedding needs a valid id, in padding too
            "shift_labels": ids_and_padding[:, 1:].contiguous(),
        }
        if self.tokens.has_loss_mask or self.end_of_text is not None:
            marks = np.zeros((len(starts), width), dtype=np.uint8)
            for row_marks, start in zip(marks, starts, strict=True):
                text_marks = self.tokens.marks(start, min(start + width, len(self.tokens)), self.end_of_text)
                row_marks[: len(text_marks)] = text_marks
            batch["shift_labels"][torch.from_numpy(marks[:, 1:] & IN_LOSS == 0)] = IGNORE_INDEX
            if self.end_of_text is not None:
                batch["position_ids"] = torch.from_numpy(document_positions(marks[:, :-1] & ENDS_DOCUMENT > 0))
        return batch

    def target_count(self, starts: Sequence[int]) -> int:
        """Number of targets in the loss. The samples must not reach beyond the end of the split."""
        sample_marks = (self.tokens.marks(start + 1, start + 1 + self.block_size) for start in starts)
        return sum(int(np.count_nonzero(marks & IN_LOSS)) for marks in sample_marks)

    def full_pass(self) -> Sequence[int]:
        return range(0, len(self.tokens) - 1, self.block_size)


def document_positions(ends: np.ndarray) -> np.ndarray:
    """The position of every token in its document: int64 [B, T].

    `ends`, bool [B, T], is true where a token is the last one of its document. The first document of a row counts from
    the start of the row, even if it started before.
    """
    columns = np.arange(ends.shape[1])
    starts_document = np.zeros(ends.shape, dtype=bool)
    starts_document[:, 1:] = ends[:, :-1]
    return columns - np.maximum.accumulate(np.where(starts_document, columns, 0), axis=1)
