"""Find the rank that all others wait for: how long each takes for what it does alone."""

import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from minigpt.data.samples import Batch

SLOW, LEAST_S = 1.5, 0.02  # a slow rank takes so many times as long as the median, and so many seconds longer


class RankTimes:
    """The seconds of this rank for fetching batches and for its forward passes.

    Backward passes and updates wait for the other ranks; so do the forward passes of a sharded model, which are
    therefore not counted.
    """

    def __init__(self, accelerator: Accelerator, step: int) -> None:
        self.accelerator = accelerator
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._steps_before = step

    def fetching(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; the time that each takes is counted."""
        iterator = iter(batches)
        while True:
            started = time.perf_counter()
            batch = next(iterator, None)
            self._seconds += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Count the time of a forward pass; on a GPU that of the device, which the host does not wait for."""
        if self.accelerator.is_fsdp2:
            yield
        elif self.accelerator.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def slow_rank(self, step: int) -> str | None:
        """A sentence about the slowest rank since the last call, if all others wait for it. Every rank must call this.

        To be called when the device has finished the step.
        """
        seconds = self._seconds + sum(start.elapsed_time(end) / 1000 for start, end in self._events)
        steps, self._steps_before = step - self._steps_before, step
        self._seconds, self._events = 0.0, []
        if self.accelerator.num_processes < 3 or steps < 1:  # of two, each may be the one that is not usual
            return None
        times = gather_object([(seconds / steps, self.accelerator.process_index, socket.gethostname())])
        slowest, rank, host = max(times)
        median = sorted(times)[len(times) // 2][0]
        if slowest < SLOW * median or slowest - median < LEAST_S:
            return None
        return (
            f"rank {rank} on {host} is slow: {slowest:.3f} s a step for its batches and forward passes, the median is "
            f"{median:.3f} s"
        )
