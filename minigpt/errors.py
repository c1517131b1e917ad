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
    """Turn a ValueError or OSError into one line on stderr, once a host, and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("MINIGPT_DEBUG"):
            raise
        rank = os.environ.get("LOCAL_RANK", "0")
        if rank != "0":
            time.sleep(5)  # when all fail alike, the launcher ends this process before it repeats what rank 0 said
            program = f"{program} (local rank {rank})"
        print(f"{program}: {_sentence(error)}", file=sys.stderr, flush=True)
        sys.exit(2)


def _sentence(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


class OneLineParser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, without the usage, and exits with 2."""

    def error(self, message: str) -> NoReturn:
        print(f"{Path(self.prog).name}: {message}", file=sys.stderr)
        sys.exit(2)
