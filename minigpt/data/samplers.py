"""The order of training samples, as a pure function of seed, epoch and position, and its division into batches.

A position counts the samples of a run from 0 on, over all epochs and processes. An order maps positions to sample ids,
so a run can resume anywhere: there is nothing to save except the number of samples seen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from minigpt.data.permutation import permuted, round_keys
from minigpt.utils.errors import UserError


class Order(Protocol):
    """Maps a position in the run to a sample id. An epoch has `samples_per_epoch` positions."""

    samples_per_epoch: int

    def __getitem__(self, position: int) -> int: ...


class ShuffledOrder:
    """Visits the samples `first_id` … `first_id + samples_per_epoch - 1` once per epoch, each epoch in another order.

    The order depends on `seed`, the epoch and `source`, the index of the data source in a mixture. It takes no memory,
    however many samples there are.
    """

    def __init__(self, samples_per_epoch: int, seed: int, first_id: int = 0, source: int = 0) -> None:
        self.samples_per_epoch, self.seed, self.first_id, self.source = samples_per_epoch, seed, first_id, source

    def __getitem__(self, position: int) -> int:
        """The sample id at `position`."""
        epoch, place = divmod(position, self.samples_per_epoch)
        return self.first_id + self._sample(permuted(place, self.samples_per_epoch, self._keys(epoch)), epoch)

    def _sample(self, number: int, epoch: int) -> int:
        """The sample, counted from 0, that has a number below `samples_per_epoch` in an epoch."""
        return number

    @lru_cache(maxsize=64)  # noqa: B019 (the loader reads ahead, so it may be in the next epoch already)
    def _keys(self, epoch: int) -> list[int]:
        return round_keys([self.seed, epoch, self.source])


class BlockOrder(ShuffledOrder):
    """Visits blocks of `block_size` tokens; the id of a block is the position of its first token.

    Blocks start `stride` tokens apart (default: `block_size`), from an offset that changes with the epoch, so that a
    token has another context in every epoch. Raises UserError if there are too few tokens for one block.
    """

    def __init__(
        self, tokens: int, block_size: int, seed: int, stride: int | None = None, first_id: int = 0, source: int = 0
    ) -> None:
        targets = tokens - 1
        if targets < block_size:
            raise UserError(
                f"the text has {tokens} tokens, fewer than one sample of block_size={block_size} plus its last "
                f"target; try block_size={max(1, targets)} or more text"
            )
        self.stride = stride or block_size
        # one block less than fits, which leaves room for the offset
        super().__init__(max(1, (targets - block_size) // self.stride), seed, first_id, source)
        self.offsets = min(self.stride, targets - block_size - (self.samples_per_epoch - 1) * self.stride + 1)

    def _sample(self, number: int, epoch: int) -> int:
        return self._keys(epoch)[0] % self.offsets + self.stride * number


@dataclass(frozen=True)
class TrainBatchSampler:
    """Yields the micro-batches of one process as lists of sample ids, without end (a PyTorch batch sampler).

    One step of the run takes the next `global batch` positions of `order`, so its samples do not depend on how many
    processes and micro-batches share them. `start` is the position at which the run starts or resumes.
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
class EvaluationBatchSampler:
    """Yields the evaluation batches of one process as lists of sample ids (a PyTorch batch sampler).

    Batch b belongs to process b mod `processes`, so the batches are the same for any number of processes. All
    processes yield equally many, because with sharded weights every forward pass needs all of them: a process that has
    no batch left in the last round yields the first sample again, which must not be counted (see `counted`).
    """

    sample_ids: Sequence[int]
    batch_size: int
    rank: int
    processes: int

    def __iter__(self) -> Iterator[list[int]]:
        rounds = -(-self._batches // self.processes)
        for number in range(self.rank, self.processes * rounds, self.processes):
            first = number * self.batch_size
            is_repeat = number >= self._batches
            yield list(self.sample_ids[:1] if is_repeat else self.sample_ids[first : first + self.batch_size])

    @property
    def counted(self) -> int:
        """How many of this process's batches count, from the first one on."""
        return len(range(self.rank, self._batches, self.processes))

    @property
    def _batches(self) -> int:
        return -(-len(self.sample_ids) // self.batch_size)
