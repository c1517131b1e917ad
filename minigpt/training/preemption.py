"""Stop a run early on a signal: after the current step, on all ranks together."""

import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")


class StopRequest:
    """Catches Ctrl-C, SIGTERM and SIGUSR1 while the steps are made, and remembers them for `received_by_any_rank`.

    Before the steps (until `listen`), only SIGUSR1 is remembered, since a batch system may send it early. Before them
    and after them (from `release` on), Ctrl-C and SIGTERM end the process at once. During the steps, a second Ctrl-C
    does, after `PATIENCE_S`.
    """

    PATIENCE_S = 2.0  # torchrun forwards a Ctrl-C to its workers, which the terminal has sent it to as well

    def __init__(self) -> None:
        self.received: str | None = None  # the name of the first signal on this rank
        self._received_at = 0.0
        self._group: torch.distributed.ProcessGroup | None = None
        self._earlier_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if hasattr(signal, "SIGUSR1"):
            self._handle(signal.SIGUSR1, self._receive)
        self._handle(signal.SIGTERM, _exit)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def listen(self) -> None:
        """Remember every signal from now on. Every rank must call this."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # on the CPU, so that comparing the ranks after every step never waits for a GPU
            is_on_cpu = torch.distributed.get_backend() == "gloo"
            self._group = torch.distributed.group.WORLD if is_on_cpu else torch.distributed.new_group(backend="gloo")
        for name in SIGNALS:
            if hasattr(signal, name):
                self._handle(getattr(signal, name), self._receive)

    def release(self) -> None:
        """Give the signals back to the handlers they had before."""
        for number, handler in self._earlier_handlers.items():
            signal.signal(number, handler)
        self._earlier_handlers = {}

    def received_by_any_rank(self) -> bool:
        """Whether any rank has received a signal. Every rank must call this once per step; all get the same answer."""
        if self._group is None:
            return self.received is not None
        any_received = torch.tensor(int(self.received is not None))
        torch.distributed.all_reduce(any_received, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(any_received)

    def _handle(self, number: signal.Signals, handler: Any) -> None:
        earlier = signal.signal(number, handler)
        self._earlier_handlers.setdefault(number, earlier)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_at = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._received_at > self.PATIENCE_S:
            raise KeyboardInterrupt


def _exit(number: int, frame: FrameType | None) -> None:
    """End the process with the shell's exit code for this signal, after the cleanup of all blocks it is in."""
    sys.exit(128 + number)
