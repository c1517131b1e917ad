"""Laws of progress: a bar in a terminal that never breaks a line of the log, and plain lines elsewhere."""

import os
import re
import subprocess
import sys

import pytest

from minigpt.utils import progress
from minigpt.utils.progress import Progress
from support.runs import ROOT

PROGRAM = """
import time
from minigpt.utils.progress import Progress, print_line
with Progress("training", 8, "step", delay=0, plain=False) as bar:
    for step in range(8):
        time.sleep(0.12)
        bar.update()
        bar.set_status(f"loss {8 - step}.00")
        print_line(f"step {step}")
print("done")
"""


def in_terminal(program: str) -> str:
    """What a program writes when stdout and stderr are a terminal of 100 columns."""
    pty = pytest.importorskip("pty")  # not on Windows
    import fcntl
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", program], stdout=follower, stderr=follower, cwd=ROOT)
    os.close(follower)
    written = b""
    while True:
        try:
            block = os.read(leader, 4096)
        except OSError:  # the end of a terminal
            break
        if not block:
            break
        written += block
    assert process.wait() == 0
    os.close(leader)
    return written.decode()


def screen_lines(written: str) -> list[str]:
    """The lines that stay on the screen: a carriage return starts its line again."""
    lines = []
    for line in written.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", shown).rstrip())
    return lines


def test_a_bar_in_a_terminal_leaves_the_lines_of_the_log_whole() -> None:
    written = in_terminal(PROGRAM)
    assert re.search(r"training: +\d+%.*\d/8 .*step.*loss \d\.00", written)
    assert screen_lines(written) == [*(f"step {step}" for step in range(8)), "done", ""]


def test_without_a_terminal_the_log_is_the_only_output() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.splitlines() == [*(f"step {step}" for step in range(8)), "done"]
    assert run.stderr == ""


def test_without_a_terminal_long_work_prints_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.0)
    with Progress("train split", 4, "documents") as bar:
        bar.set_status("1.0 M tokens")
        bar.update(3)
    assert capsys.readouterr().err == "train split: 3 of 4 (75%) documents in 0:00, 1.0 M tokens\n"
