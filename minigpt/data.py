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
    """Samples of T = `block_size` tokens: sample i starts at token i·stride, its targets one token later.

    With `partial`, the samples that the end of the text cuts short are there too, padded with targets that have no
    loss; with stride = T every token but the very first is then a target exactly once.
    """

    def __init__(self, tokens: Tokens, block_size: int, stride: int | None = None, partial: bool = False) -> None:
        self.tokens, self.block_size, self.stride = tokens, block_size, stride or block_size
        targets = len(tokens) - 1
        if targets < (1 if partial else block_size):
            raise ValueError(
                f"the text has {len(tokens)} tokens, fewer than one sample of block_size={block_size} and its last "
                f"target; try block_size={max(1, targets)} or more text"
            )
        self.samples = -(-targets // self.stride) if partial else (targets - block_size) // self.stride + 1

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, sample: int) -> Batch:
        return {name: rows[0] for name, rows in self.__getitems__([sample]).items()}

    def __getitems__(self, samples: list[int]) -> Batch:
        """A whole batch at once: `input_ids` and `shift_labels`, both [B, T] int64."""
        width = self.block_size + 1
        rows = np.full((len(samples), width), IGNORED, dtype=np.int64)
        for row, sample in zip(rows, samples, strict=True):
            start = sample * self.stride
            ids = self.tokens.read(start, min(start + width, len(self.tokens)))
            row[: len(ids)] = ids
        batch = torch.from_numpy(rows)
        # the padding of a sample that was cut short has to be a token that exists
        return {"input_ids": batch[:, :-1].clamp(min=0), "shift_labels": batch[:, 1:].contiguous()}


class SampleOrder:
    """Position → sample. Each epoch visits every sample once, in an order that (seed, epoch) alone decides."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples, self.seed = samples, seed
        self._epoch: int | None = None
        self._permutation = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.samples)
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.samples)
            self._epoch = epoch
        return int(self._permutation[place])


@dataclass(frozen=True)
class TrainBatches:
    """The micro-batches of one process, without end, as lists of samples (a PyTorch batch sampler).

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
    """Every sample once: batch b belongs to process b mod `processes`, so batches are the same for any number."""

    samples: int
    batch_size: int
    rank: int
    processes: int

    def __iter__(self) -> Iterator[list[int]]:
        step = self.batch_size * self.processes
        for first in range(self.rank * self.batch_size, self.samples, step):
            yield list(range(first, min(first + self.batch_size, self.samples)))

    def __len__(self) -> int:
        return len(range(self.rank * self.batch_size, self.samples, self.batch_size * self.processes))


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
