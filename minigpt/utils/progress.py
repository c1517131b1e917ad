"""Progress of long work: a bar in a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

from minigpt.utils.errors import drop_stdout
from minigpt.utils.files import is_disk_full
from minigpt.utils.formatting import format_duration

PLAIN_INTERVAL_S = 30.0


class Progress:
    """Counts finished work. In a terminal this is a tqdm bar on stderr, which disappears at the end.

    If stderr is not a terminal, a plain line appears every `PLAIN_INTERVAL_S` seconds, or never with `plain=False`
    (for work that has a log of its own). Work shorter than `delay` seconds shows no bar.
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        unit: str,
        *,
        initial: int = 0,
        unit_scale: bool = False,
        delay: float = 2.0,
        plain: bool = True,
        enabled: bool = True,
    ) -> None:
        in_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            desc=description,
            total=total,
            initial=initial,
            unit=unit,
            unit_scale=unit_scale,
            delay=delay,
            leave=False,
            dynamic_ncols=True,
            disable=not (enabled and in_terminal),
        )
        self._description, self._total, self._unit = description, total, unit
        self._done, self._status = initial, ""
        self._plain = plain and enabled and not in_terminal
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def update(self, amount: int = 1) -> None:
        """Count `amount` more units."""
        self._done += amount
        self._bar.update(amount)
        now = time.monotonic()
        if self._plain and now - self._printed >= PLAIN_INTERVAL_S:
            self._printed = now
            of_total = f" of {self._total:,} ({self._done / self._total:.0%})" if self._total else ""
            status = f", {self._status}" if self._status else ""
            elapsed = format_duration(now - self._started)
            print(f"{self._description}: {self._done:,}{of_total} {self._unit} in {elapsed}{status}", file=sys.stderr)

    def set_total(self, total: int) -> None:
        """Change the amount of work."""
        self._total = self._bar.total = total

    def set_status(self, text: str) -> None:
        """Set the text after the bar, such as a loss or a rate."""
        self._status = text
        self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


def print_line(text: str) -> None:
    """Print to stdout at once, above any bar that is on the screen.

    If nobody reads stdout any more (`minigpt train | head`), or its disk is full, the lines are dropped and the work
    continues.
    """
    try:
        if sys.stderr.isatty():
            tqdm.write(text)
            sys.stdout.flush()
        else:
            print(text, flush=True)
    except BrokenPipeError:
        drop_stdout()
    except OSError as error:
        if not is_disk_full(error):
            raise
