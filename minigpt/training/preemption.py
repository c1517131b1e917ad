"""Stop a run early on a signal: after the current step, on all ranks together."""

import signal
import time
from types import FrameType

import torch
import torch.distributed

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")


class StopRequest:
    """Catches Ctrl-C, SIGTERM and SIGUSR1. A second Ctrl-C, after `PATIENCE_S`, ends the process at once."""

    PATIENCE_S = 2.0  # torchrun forwards a Ctrl-C to its workers, which the terminal has sent it to as well

    def __init__(self) -> None:
        self.received: str | None = None  # the name of the first signal on this rank
        self._received_at = 0.0
        self._group = None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # on the CPU, so that comparing the ranks after every step never waits for a GPU
            self._group = torch.distributed.new_group(backend="gloo")
        for name in SIGNALS:
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_at = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._received_at > self.PATIENCE_S:
            raise KeyboardInterrupt

    def received_by_any_rank(self) -> bool:
        """Whether any rank has received a signal. Every rank must call this once per step; all get the same answer."""
        if self._group is None:
            return self.received is not None
        any_received = torch.tensor(int(self.received is not None))
        torch.distributed.all_reduce(any_received, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(any_received)
