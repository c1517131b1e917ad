"""Which tokens does a step see? A pure function of seed, epoch and position, however many processes share the work."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from minigpt.arguments import BatchArguments
from minigpt.shards import ENDS_DOCUMENT, IN_LOSS, Tokens

Batch = dict[str, torch.Tensor]
IGNORED = -100  # the label that has no loss


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
        rows = np.full((len(starts), width), IGNORED, dtype=np.int64)
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
            named["shift_labels"][torch.from_numpy(marks[:, 1:] & IN_LOSS == 0)] = IGNORED
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


class Order(Protocol):
    """Position in a run → sample; an epoch has `samples` positions."""

    samples: int

    def __getitem__(self, position: int) -> int: ...


class EpochOrder:
    """Position → sample. Each epoch visits every sample once, in an order of its own that (seed, epoch) decide.

    Of several sources each has its `source` number, and the samples of each begin with number `first`.
    """

    def __init__(self, samples: int, seed: int, first: int = 0, source: int = 0) -> None:
        self.samples, self.seed, self.first, self.source = samples, seed, first, source
        self._epochs: dict[int, np.ndarray] = {}

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.samples)
        if epoch not in self._epochs:
            for old in sorted(self._epochs)[:-1]:  # the loader is ahead of the loop: they may be in two epochs
                del self._epochs[old]
            seeds = [self.seed, epoch, self.source] if self.source else [self.seed, epoch]
            self._epochs[epoch] = self.first + self._shuffled(np.random.default_rng(seeds))
        return int(self._epochs[epoch][place])

    def _shuffled(self, generator: np.random.Generator) -> np.ndarray:
        return generator.permutation(self.samples)


class SampleOrder(EpochOrder):
    """Position → first token of a sample of `block_size` tokens.

    Samples start `stride` tokens apart, from an offset that changes with the epoch, so that a token meets other
    contexts in the next one.
    Raises ValueError when the text is shorter than one sample.
    """

    def __init__(
        self, tokens: int, block_size: int, seed: int, stride: int | None = None, first: int = 0, source: int = 0
    ) -> None:
        targets = tokens - 1
        if targets < block_size:
            raise ValueError(
                f"the text has {tokens} tokens, fewer than one sample of block_size={block_size} and its last target; "
                f"try block_size={max(1, targets)} or more text"
            )
        self.stride = stride or block_size
        # one fewer than fit, to leave the offset room
        super().__init__(max(1, (targets - block_size) // self.stride), seed, first, source)
        self.room = min(self.stride, targets - block_size - (self.samples - 1) * self.stride + 1)

    def _shuffled(self, generator: np.random.Generator) -> np.ndarray:
        offset = generator.integers(self.room)
        return offset + self.stride * generator.permutation(self.samples)


@dataclass(frozen=True)
class TrainBatches:
    """The micro-batches of one process, without end, as lists of samples (a PyTorch batch sampler).

    A step of the whole run is `start … start + global batch` in `order`, so its samples do not depend on how many
    processes and micro-batches share them.
    """

    order: Order
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
    """Every target once. Batch b belongs to process b mod `processes`: batches are the same for any number of them.

    In the last round a process for which none is left reads the first sample again, which does not count (`counted`):
    where weights are sharded each forward needs all processes.
    """

    samples: Sequence[int]
    batch_size: int
    rank: int
    processes: int

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.rank, self.processes * -(-self._batches // self.processes), self.processes):
            first = number * self.batch_size if number < self._batches else 0
            yield list(self.samples[first : first + (self.batch_size if number < self._batches else 1)])

    @property
    def counted(self) -> int:
        """Batches of this process whose targets count: all but a last one, perhaps."""
        return len(range(self.rank, self._batches, self.processes))

    @property
    def _batches(self) -> int:
        return -(-len(self.samples) // self.batch_size)


def loader(samples: Samples, batches: TrainBatches | EvaluationBatches, workers: int = 0) -> DataLoader[Batch]:
    """Read `batches` of `samples` with PyTorch's loader, into pinned memory where there is a CUDA device."""
    return DataLoader(
        samples,
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
