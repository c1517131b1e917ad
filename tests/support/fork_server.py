"""Start Python programs in a tenth of a second, by a fork of a process that has already imported torch.

A program is a process of its own, as if started by `python SCRIPT …` or `python -m MODULE …`: with its own arguments,
environment, working folder and exit code; it can be killed. It inherits the imported modules, so a variable that an
import reads (OMP_NUM_THREADS, HF_ENDPOINT, HF_HOME) has no effect here: start a program that needs one as usual.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from functools import cache
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[2]
MAX_REQUEST = 1 << 20  # bytes
SERVER_LOCK = threading.Lock()


class Process:
    """A started program; its output goes to temporary files."""

    def __init__(self, words: list[str], env: dict[str, str] | None, cwd: Path | None) -> None:
        self.args, self.returncode = words, None
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115 (open as long as the program)
        self._status, status = os.pipe()
        request = {"words": words[1:], "env": dict(env or os.environ), "cwd": str(cwd or Path.cwd())}
        with SERVER_LOCK:
            descriptors = [*(file.fileno() for file in self._files), status]
            socket.send_fds(_server(), [json.dumps(request).encode()], descriptors)
            self.pid = int(_server().recv(64))
        os.close(status)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, negative for a signal; raises TimeoutExpired."""
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._status, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(int(os.read(self._status, 64)))
            os.close(self._status)
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def stdout(self) -> str:
        return self._text(0)

    def stderr(self) -> str:
        return self._text(1)

    def _text(self, index: int) -> str:
        size = os.fstat(self._files[index].fileno()).st_size
        return os.pread(self._files[index].fileno(), size, 0).decode("utf-8", errors="replace")


def can_fork(words: list[str]) -> bool:
    """Whether the command line is a Python program that the server can start."""
    return hasattr(os, "pidfd_open") and words[0] == sys.executable and (words[1] == "-m" or words[1].endswith(".py"))


def start(words: list[str], env: dict[str, str] | None = None, cwd: Path | None = None) -> Process:
    """Start a program; `words` is its command line and begins with `sys.executable`."""
    return Process(words, env, cwd)


def start_ranks(words: list[str], processes: int, env: dict[str, str] | None = None) -> list[Process]:
    """Start a program in gloo processes, with the environment that `accelerate launch` would give them, and `env`."""
    env = {**os.environ, "ACCELERATE_MIXED_PRECISION": "no", **(env or {})}
    if processes == 1:
        return [start(words, env)]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [start(words, {**env, **address, **world, **rank}) for rank in ranks]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def finish_ranks(ranks: list[Process], timeout: float) -> int:
    """Wait for all ranks; if one fails, end the others as torch's launcher does. Returns the first code not 0."""
    deadline = time.monotonic() + timeout
    codes: list[int | None] = [None]
    while None in codes and not any(codes):
        if time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
            raise subprocess.TimeoutExpired(ranks[0].args, timeout)
        time.sleep(0.02)
        codes = [rank.poll() for rank in ranks]
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    for rank in ranks:
        try:
            rank.wait(timeout=30)
        except subprocess.TimeoutExpired:
            rank.kill()
    return next((code for code in codes if code), 0)


@cache
def _server() -> socket.socket:
    """The connection to the server, which ends when this process closes it."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # requests stay whole
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(there.fileno())]
    server = subprocess.Popen(command, pass_fds=[there.fileno()], env=environment, stdin=subprocess.DEVNULL)
    there.close()
    atexit.register(server.wait)
    atexit.register(here.close)  # runs before the wait above
    return here


def serve(connection: socket.socket) -> list[str] | None:
    """Fork a child for each request. Returns the program's words in a child; None in the server, at its end."""
    running: dict[int, tuple[int, int]] = {}  # pidfd: (pid, where its status is written)
    selector = selectors.DefaultSelector()
    selector.register(connection, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is not connection:
                pid, status = running.pop(key.fd)
                os.write(status, str(os.waitpid(pid, 0)[1]).encode())
                selector.unregister(key.fd)
                os.close(status)
                os.close(key.fd)
                continue
            data, (stdout, stderr, status), *_ = _receive(connection)
            if not data:
                for pid, _ in running.values():
                    os.kill(pid, signal.SIGKILL)
                return None
            pid = os.fork()
            if pid == 0:
                selector.close()
                connection.close()
                for descriptor in [status, *running, *(other for _, other in running.values())]:
                    os.close(descriptor)
                return _become(json.loads(data), stdout, stderr)
            connection.send(str(pid).encode())
            os.close(stdout)
            os.close(stderr)
            pidfd = os.pidfd_open(pid)
            running[pidfd] = pid, status
            selector.register(pidfd, selectors.EVENT_READ)


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    data, descriptors, *_ = socket.recv_fds(connection, MAX_REQUEST, 3)
    return data, descriptors or [-1, -1, -1]


def _become(request: dict, stdout: int, stderr: int) -> list[str]:
    """Take the output files, environment and working folder of a request; return its command line."""
    for target, source in ((1, stdout), (2, stderr)):
        os.dup2(source, target)
        os.close(source)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    return request["words"]


def run_program(words: list[str]) -> NoReturn:
    """Run and end as `python WORDS` does, except that modules are not torn down one by one (which takes a second)."""
    code: object = 0
    try:
        if words[0] == "-m":
            sys.argv, sys.path[0] = words[1:], str(Path.cwd())
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        traceback.print_exception(error)
        code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def preload() -> None:
    """Import what the programs of the project import."""
    for name in ("train_accelerate", "hub_upload", "minigpt.commands.eval", "datasets", "evaluate", "matplotlib"):
        importlib.import_module(name)


if __name__ == "__main__":
    preload()
    gc.freeze()  # a collection in a child would copy the pages of all these modules
    if (words := serve(socket.socket(fileno=int(sys.argv[1])))) is not None:
        run_program(words)
