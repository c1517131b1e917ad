"""The order of samples: a pure function of seed, epoch and position."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from minigpt.utils.errors import UserError


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
    Raises UserError when the text is shorter than one sample.
    """

    def __init__(
        self, tokens: int, block_size: int, seed: int, stride: int | None = None, first: int = 0, source: int = 0
    ) -> None:
        targets = tokens - 1
        if targets < block_size:
            raise UserError(
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
