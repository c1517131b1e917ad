"""Run a case in a folder of its own and judge what the program did."""

import hashlib
import os
import resource
import shutil
import stat
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from system.fuzz.accepted import is_known_limit
from system.fuzz.cases import Case, copy_all

from support import fork_server

TIMEOUT_S = 20
LAUNCHER_TIMEOUT_S = 60  # accelerate's launcher starts the trainer anew
MEMORY_BYTES = 6_000_000_000  # of address space, above what the imported libraries take
# notes, the progress bar of `datasets`, and what is said about data that were prepared
NOT_ERRORS = ("(note: ", "Generating ", "     train: ", "validation: ", "prepared in ", "waiting for process ")
RIGHT = ("one line", "accepted", "known limit")


@dataclass(frozen=True)
class Verdict:
    """What a program did: `one line`, `accepted`, `known limit`, or the name of a fault."""

    case: Case
    verdict: str
    output: str

    @property
    def is_fault(self) -> bool:
        return self.verdict not in RIGHT


def run_case(case: Case, materials: Path, folder: Path, cache: Path) -> Verdict:
    """Make the folder of a case, run its command line there, judge, and delete the folder."""
    folder.mkdir()
    try:
        copy_all(case, materials, folder)
        before = snapshot(folder)
        words = [word.replace("CACHE", str(cache)) for word in case.words]
        process = fork_server.start([sys.executable, *_program(case), *words], cwd=folder)
        _limit_memory(process.pid)
        try:
            code: int | None = process.wait(LAUNCHER_TIMEOUT_S if case.verb == "train" else TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
        output = f"exit code {code}\n{process.stdout()[-1500:]}\n{process.stderr()[-4000:]}"
        verdict = judge(case, code, process.stderr(), before == snapshot(folder))
        if verdict not in RIGHT and is_known_limit(case.name):
            verdict = "known limit"
        return Verdict(case, verdict, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _limit_memory(pid: int) -> None:
    with suppress(OSError):  # the program may have ended
        size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(pid, resource.RLIMIT_AS, (size + MEMORY_BYTES,) * 2)


def _program(case: Case) -> tuple[str, ...]:
    from system.fuzz.cases import PROGRAMS

    return PROGRAMS[case.verb].program


def judge(case: Case, code: int | None, errors: str, is_unchanged: bool) -> str:
    lines = [line for line in errors.splitlines() if line.strip() and not line.startswith(NOT_ERRORS)]
    if code is None:
        return "hang"
    if "Traceback (most recent call last)" in errors:
        return "traceback"
    if code == 0:
        return "accepted" if case.accepted else "silent"
    if code != 2:
        return "wrong exit code"
    if not is_unchanged:
        return "changed"
    if len(lines) != 1 or not lines[0].startswith(f"{case.title}: "):
        return "many lines"
    if not any(culprit in lines[0] for culprit in case.culprits):
        return "does not name the culprit"
    return "refused" if case.kind == "name" and case.accepted else "one line"


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Name → type and content of everything below a folder."""
    entries = {}
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(root, name)
            mode = path.lstat().st_mode
            content = ""
            if stat.S_ISLNK(mode):
                content = str(path.readlink())
            elif stat.S_ISREG(mode):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            entries[str(path.relative_to(folder))] = stat.S_IFMT(mode), content
    return entries
