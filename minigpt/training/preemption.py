"""Stop early on a signal: at the end of a step, agreed by all ranks."""

import signal
import time
from typing import Any

import torch
import torch.distributed

EXIT_STOPPED = 75  # sysexits' EX_TEMPFAIL: saved and stopped, start again to go on

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")


class StopRequest:
    """Remembers Ctrl-C, SIGTERM and SIGUSR1; Ctrl-C again, after `PATIENCE_S`, ends the process at once."""

    PATIENCE_S = 2.0  # torchrun passes a Ctrl-C on to processes that the terminal has told already

    def __init__(self) -> None:
        self.received: str | None = None
        self._received_at = 0.0
        self._group = None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # on the CPU, so that asking every step never waits for a GPU
            self._group = torch.distributed.new_group(backend="gloo")
        for name in SIGNALS:
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is None:
            self.received, self._received_at = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._received_at > self.PATIENCE_S:
            raise KeyboardInterrupt

    def agreed(self) -> bool:
        """Whether any process was asked to stop. Every process must ask, once a step."""
        if self._group is None:
            return self.received is not None
        asked = torch.tensor(int(self.received is not None))
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(asked)
