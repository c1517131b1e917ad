"""Errors meant for the user: one line and exit code 2. Any other exception is a bug and keeps its traceback.

Exit codes of all programs of the project:

    0    done
    1    a bug (with its traceback), or a run that could not finish: a lost process, a full disk, no memory or no Hub
    2    bad input: nothing was trained, written or sent
    75   training stopped on a signal after saving a checkpoint; run the same command again to resume
    76   training stopped after saving: too many steps were skipped
    130  Ctrl-C
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn

EXIT_FAILURE, EXIT_BAD_INPUT, EXIT_STOPPED, EXIT_DIVERGED, EXIT_CTRL_C = 1, 2, 75, 76, 130
EXIT_BROKEN_PIPE = 141  # as a shell reports it


class UserError(ValueError):
    """Something the user can put right. The message names the value, the rule and the way out."""

    exit_code = EXIT_BAD_INPUT


class RunFailure(UserError):
    """Something outside the program ended a run after its first step, such as a full disk or an unreachable Hub."""

    exit_code = EXIT_FAILURE


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Print a `UserError` as one line, once per host, and exit with 2.

    A lost process, or a GPU whose memory runs out, is one line too, with exit code 1, and Ctrl-C one with 130.
    `MINIGPT_DEBUG=1` shows the traceback as well. A reader of stdout that goes away (`| head`) is no error.
    """
    try:
        try:
            yield
        finally:
            _end_process_group()
            sys.stdout.flush()
    except BrokenPipeError:
        drop_stdout()
        sys.exit(EXIT_BROKEN_PIPE)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr, flush=True)
        sys.exit(EXIT_CTRL_C)
    except UserError as error:
        if os.environ.get("MINIGPT_DEBUG"):
            raise
        exit_in_one_line(program, str(error), error.exit_code)
    except RuntimeError as error:
        if os.environ.get("MINIGPT_DEBUG"):
            raise
        if type(error).__name__ == "OutOfMemoryError":  # torch's
            remedy = "use a smaller batch or shorter texts, or another device"
            exit_in_one_line(program, f"{out_of_memory_reason(error)}; {remedy}", EXIT_FAILURE)
        if not _is_lost_process(error):
            raise
        reason = " ".join(str(error).split())
        message = (
            f"rank {os.environ.get('RANK', '0')} has lost another rank or its host; that rank's log says why; "
            f"start all hosts again with --resume_from_checkpoint latest ({reason})"
        )
        # at once: other ranks only notice when this one's connections are closed
        exit_in_one_line(program, message, EXIT_FAILURE, once_per_host=False)


@contextmanager
def file_errors_are_user_errors() -> Iterator[None]:
    """Turn an OSError that names a file (missing, not readable, disk full) into a UserError.

    For code whose files the user has named. Training wraps its set-up in this, but not its steps.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None or not error.strerror:
            raise
        raise UserError(f"{error.filename}: {error.strerror}") from error
    except RuntimeError as error:
        if not str(error).startswith("Symlink loop"):  # Path.resolve, before Python 3.13
            raise
        raise UserError(str(error)) from error


def _end_process_group() -> None:
    """End torch's process group, if there is one: left to the exit, its threads may abort the process."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def end_quietly_on_ctrl_c(program: str) -> None:
    """Make Ctrl-C outside of `one_line_errors`, as while libraries are imported, one line and exit code 130."""

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print(f"{program}: interrupted", file=sys.stderr, flush=True)
            os._exit(EXIT_CTRL_C)
        sys.__excepthook__(kind, error, traceback)

    sys.excepthook = hook


def drop_stdout() -> None:
    """Send everything that is printed from now on nowhere: nobody reads stdout any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class if there is no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def out_of_memory_reason(error: BaseException) -> str:
    """What torch says of a GPU's memory that ran out: what was asked for and what is free, without its advice."""
    return ". ".join(first_line(error).split(". ")[:3]).rstrip(".")


def exit_in_one_line(program: str, message: str, code: int = EXIT_BAD_INPUT, once_per_host: bool = True) -> NoReturn:
    """Print `program: message` in one line on stderr and exit with `code`."""
    rank = os.environ.get("LOCAL_RANK", "0")
    if rank != "0" and once_per_host:
        time.sleep(5)  # if all ranks have the same error, the launcher ends this one before it prints the same line
    if rank != "0":
        program = f"{program} (local rank {rank})"
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def _is_lost_process(error: RuntimeError) -> bool:
    """Whether another process of the training is gone: gloo raises a bare RuntimeError, NCCL a class of torch's."""
    return "gloo/transport" in str(error) or type(error).__name__ in ("DistBackendError", "DistNetworkError")
