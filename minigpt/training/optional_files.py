"""Files that a run can do without: while the disk is full they are dropped, and the run continues."""

from collections.abc import Callable
from pathlib import Path

from minigpt.utils.files import is_disk_full, lack_of_room
from minigpt.utils.progress import print_line

SMALL_FILES_BYTES = 4_000_000  # an upper bound for tokenizer, modeling code and configs
LINE_BYTES = 100_000  # an upper bound for one line of metrics in all its files


def room_for_saving(weights_bytes: int) -> int:
    """Bytes of one checkpoint (weights and at most two moments) and the final model."""
    return 4 * weights_bytes + 2 * SMALL_FILES_BYTES


class OptionalFiles:
    """Writes what a run can do without. What finds no room is dropped, with one note until there is room again."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._dropped: set[str] = set()

    def write(self, subject: str, needed: int, write: Callable[[], object]) -> bool:
        """Call `write` if there is room for `needed` bytes. Returns whether everything was written.

        `subject` names what is written, in the plural. An error other than a full disk is raised.
        """
        problem = lack_of_room(self.run_dir, needed)
        if problem is None:
            try:
                write()
            except Exception as error:
                if not is_disk_full(error):
                    raise
                problem = f"the disk of {self.run_dir} is full"
        if problem is not None and subject not in self._dropped:
            self._dropped.add(subject)
            print_line(f"  WARNING: {subject} are not written while the disk is full: {problem}")
        elif problem is None and subject in self._dropped:
            self._dropped.remove(subject)
            print_line(f"  note: there is room again, {subject} are written")
        return problem is None
