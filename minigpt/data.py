"""Which tokens does a step see? A pure function of seed, epoch and position, however many processes share the work."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from minigpt.arguments import BatchArguments
from minigpt.shards import Tokens

Batch = dict[str, torch.Tensor]
IGNORED = -100  # the label that has no loss


class TokenBlocks(Dataset[Batch]):
    """Samples of T = `block_size` tokens, named by their first token: T inputs, and targets one token further on.

    With `end_of_text`, the id that ends a document, a batch also holds `position_ids` that restart behind it: the
    model then keeps the documents of a sample apart, in attention and in positions.
    """

    def __init__(self, tokens: Tokens, block_size: int, end_of_text: int | None = None) -> None:
        self.tokens, self.block_size, self.end_of_text = tokens, block_size, end_of_text

    def __getitem__(self, start: int) -> Batch:
        return {name: rows[0] for name, rows in self.__getitems__([start]).items()}

    def __getitems__(self, starts: list[int]) -> Batch:
        """A whole batch at once: `input_ids` and `shift_labels`, both [B, T] int64, and `position_ids` if wanted.

        A sample that the end of the text cuts short is padded with targets that have no loss.
        """
        width = self.block_size + 1
        rows = np.full((len(starts), width), IGNORED, dtype=np.int64)
        for row, start in zip(rows, starts, strict=True):
            ids = self.tokens.read(start, min(start + width, len(self.tokens)))
            row[: len(ids)] = ids
        batch = torch.from_numpy(rows)
        # the padding of a sample that was cut short has to be a token that exists
        named = {"input_ids": batch[:, :-1].clamp(min=0), "shift_labels": batch[:, 1:].contiguous()}
        if self.end_of_text is not None:
            named["position_ids"] = torch.from_numpy(document_positions(rows[:, :-1], self.end_of_text))
        return named


def document_positions(rows: np.ndarray, end_of_text: int) -> np.ndarray:
    """The position of every token in its own document, for rows [B, T] in which `end_of_text` ends a document.

    A document that began before the row counts from the row's beginning.
    """
    places = np.arange(rows.shape[1])
    behind_an_end = np.zeros(rows.shape, dtype=bool)
    behind_an_end[:, 1:] = rows[:, :-1] == end_of_text
    return places - np.maximum.accumulate(np.where(behind_an_end, places, 0), axis=1)


class SampleOrder:
    """Position → first token of a sample. Each epoch visits every sample once, in an order of its own.

    Samples start `stride` tokens apart, from an offset that changes with the epoch, so that a token meets other
    contexts in the next one. Order and offset are functions of (seed, epoch) alone.
    Raises ValueError when the text is shorter than one sample.
    """

    def __init__(self, tokens: int, block_size: int, seed: int, stride: int | None = None) -> None:
        targets = tokens - 1
        if targets < block_size:
            raise ValueError(
                f"the text has {tokens} tokens, fewer than one sample of block_size={block_size} and its last target; "
                f"try block_size={max(1, targets)} or more text"
            )
        self.stride, self.seed = stride or block_size, seed
        self.samples = max(1, (targets - block_size) // self.stride)  # one fewer than fit, to leave the offset room
        self.room = min(self.stride, targets - block_size - (self.samples - 1) * self.stride + 1)
        self._epoch: int | None = None
        self._starts = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.samples)
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch])
            offset = generator.integers(self.room)
            self._starts = offset + self.stride * generator.permutation(self.samples)
            self._epoch = epoch
        return int(self._starts[place])


@dataclass(frozen=True)
class TrainBatches:
    """The micro-batches of one process, without end, as lists of first tokens (a PyTorch batch sampler).

    A step of the whole run is `start … start + global batch` in `order`, so its samples do not depend on how many
    processes and micro-batches share them.
    """

    order: SampleOrder
    start: int
    micro_batch: int
    rank: int
    processes: int

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.rank * self.micro_batch
        while True:
            yield [self.order[position] for position in range(first, first + self.micro_batch)]
            first += self.micro_batch * self.processes


@dataclass(frozen=True)
class EvaluationBatches:
    """Every token but the very first as a target once: windows side by side, the last one cut short.

    Batch b belongs to process b mod `processes`, so batches are the same for any number of them.
    """

    tokens: int
    block_size: int
    batch_size: int
    rank: int
    processes: int

    def __iter__(self) -> Iterator[list[int]]:
        starts = range(0, self.tokens - 1, self.block_size)
        for first in range(self.rank * self.batch_size, len(starts), self.batch_size * self.processes):
            yield list(starts[first : first + self.batch_size])


def loader(blocks: TokenBlocks, batches: TrainBatches | EvaluationBatches, workers: int = 0) -> DataLoader[Batch]:
    """Read `batches` of `blocks` with PyTorch's loader, into pinned memory where there is a CUDA device."""
    return DataLoader(
        blocks,
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=_as_it_is,  # __getitems__ has made the batch already
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )


def _as_it_is(batch: Batch) -> Batch:
    return batch


def samples_per_step(args: BatchArguments, processes: int) -> int:
    """The global batch, samples."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * processes


def steps_of_run(args: BatchArguments, samples: int, processes: int) -> int:
    """Steps of the whole run: `max_steps`, or as many as `num_train_epochs` passes over `samples` need."""
    if args.max_steps is not None:
        return args.max_steps
    per_step = samples_per_step(args, processes)
    return max(1, round(args.num_train_epochs * samples / per_step))
