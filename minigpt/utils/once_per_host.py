"""Do work once per host of a launch, before its processes can communicate."""

import hashlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import psutil
from filelock import FileLock

from minigpt.utils.errors import UserError
from minigpt.utils.files import write_atomically


def once_per_host(folder: Path, subject: str, work: Callable[[], str]) -> str:
    """The result of `work`, which one process of this launch does on each host, while the others wait for a file lock.

    Unlike a collective, the lock has no time limit. If the process is killed, the next one does the work. `subject`
    tells this work from other work of the same launch. The result is passed on in a file in `folder`, which the last
    process deletes. A UserError of `work` is raised in every process.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes == 1:
        return work()
    folder.mkdir(parents=True, exist_ok=True)
    outcome_file = folder / f".launch-{_launch_id(subject)}.json"
    lock_file = outcome_file.with_suffix(".lock")
    with FileLock(lock_file):
        if outcome_file.is_file():
            outcome = json.loads(outcome_file.read_text(encoding="utf-8"))
        else:
            outcome = {"readers": 0}
            try:
                outcome["result"] = work()
            except UserError as error:
                outcome["error"] = str(error)
        outcome["readers"] += 1
        if outcome["readers"] < processes:
            write_atomically(outcome_file, json.dumps(outcome))
        else:
            outcome_file.unlink(missing_ok=True)
            lock_file.unlink(missing_ok=True)
    if "error" in outcome:
        raise UserError(outcome["error"])
    return str(outcome["result"])


def _launch_id(subject: str) -> str:
    """The same for all processes that one launcher has started on this host, and for no others."""
    launcher = psutil.Process(os.getppid())
    start = [os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")]
    identity = [socket.gethostname(), launcher.pid, launcher.create_time(), start, subject]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
