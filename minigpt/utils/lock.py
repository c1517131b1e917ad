"""A lock that tells a second process who holds it. The system releases it when its holder is killed."""

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from minigpt.utils.errors import UserError
from minigpt.utils.files import write_atomically

HOLDER_SUFFIX = ".json"


@contextmanager
def locked(lock_file: Path, subject: str, wait: bool = False) -> Iterator[None]:
    """Hold `lock_file` during the block. The lock works on every file system: without flock, `filelock` uses the file
    itself and takes over the lock of a dead process.

    If another process holds it: with `wait`, says so and waits; else raises UserError that says that `subject` is in
    use, by which process, on which host and since when.
    """
    lock = FileLock(lock_file)
    holder_file = lock_file.with_name(lock_file.name + HOLDER_SUFFIX)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        holder = _read_holder(holder_file)
        if not wait:
            raise UserError(f"{subject} is in use by {holder}; wait until it ends, or give another folder") from error
        print(f"waiting for {holder}, which works on {subject}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        since = datetime.now().isoformat(" ", "seconds")
        write_atomically(holder_file, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}))
        yield
    finally:
        for path in (holder_file, lock_file):
            with suppress(OSError):  # on Windows, an open file cannot be deleted and stays as an empty file
                path.unlink(missing_ok=True)
        lock.release()


def _read_holder(holder_file: Path) -> str:
    try:
        holder = json.loads(holder_file.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} (since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # it is just starting or ending
        return "another process"
