"""How does a user learn what went wrong? One line, exit code 2; MINIGPT_DEBUG=1 adds the traceback."""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn a ValueError or OSError into one line on stderr, once a host, and exit code 2; a lost process into 1."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        lost = isinstance(error, RuntimeError) and _is_loss_of_a_process(error)
        if os.environ.get("MINIGPT_DEBUG") or (isinstance(error, RuntimeError) and not lost):
            raise
        rank = os.environ.get("LOCAL_RANK", "0")
        if rank != "0":
            time.sleep(5)  # when all fail alike, the launcher ends this process before it repeats what rank 0 said
            program = f"{program} (local rank {rank})"
        print(f"{program}: {_sentence(error)}", file=sys.stderr, flush=True)
        sys.exit(1 if lost else 2)


def _is_loss_of_a_process(error: RuntimeError) -> bool:
    """Whether another process of the training is gone: gloo raises a bare RuntimeError, NCCL a class of torch's."""
    return "gloo/transport" in str(error) or type(error).__name__ in ("DistBackendError", "DistNetworkError")


def _sentence(error: ValueError | OSError | RuntimeError) -> str:
    if isinstance(error, RuntimeError):
        return (
            f"process {os.environ.get('RANK', '0')} has lost another one, or its host; the log there says why; "
            f"start all hosts again to go on with --resume_from_checkpoint latest ({' '.join(str(error).split())})"
        )
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


class OneLineParser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, without the usage, and exits with 2."""

    def error(self, message: str) -> NoReturn:
        print(f"{Path(self.prog).name}: {message}", file=sys.stderr)
        sys.exit(2)
