"""When does a run stop early? At the end of the step in which any process was asked to, and all agree."""

import signal
from typing import Any

import torch
import torch.distributed

EXIT_STOPPED = 75  # sysexits' EX_TEMPFAIL: saved and stopped, start again to go on

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")


class StopRequest:
    """Remembers Ctrl-C, SIGTERM and SIGUSR1; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._group = None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # on the CPU, so that asking every step never waits for a GPU
            self._group = torch.distributed.new_group(backend="gloo")
        for name in SIGNALS:
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self) -> bool:
        """Whether any process was asked to stop. Every process must ask, once a step."""
        if self._group is None:
            return self.received is not None
        asked = torch.tensor(int(self.received is not None))
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(asked)
