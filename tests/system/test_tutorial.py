"""Laws of docs/tutorial.md: its commands work in their order, in an empty folder, and what it says comes out."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.utils.run_files import METRICS_FILE, read_metrics
from support.runs import ROOT

PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]


def run(line: str) -> str:
    """Run a command of the page in the current folder. Returns what it printed."""
    printed, _, piped = line.rpartition("|")
    words = shlex.split(piped, comments=True)
    words = [sys.executable, "-m", *words] if words[0] == "minigpt" else [sys.executable, *words[1:]]
    text = shlex.split(printed)[1].encode().decode("unicode_escape") if printed else ""
    done = subprocess.run(words, input=text, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_the_tutorial_gives_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # one test at a time has all cores
    outputs = {line: run(line) for line in COMMANDS}
    last = {
        name: [line for line in read_metrics(Path("runs", name, METRICS_FILE)) if "val/loss" in line][-1]
        for name in ("tutorial", "slower")
    }
    said = float(re.findall(r"([0-9.]+) bits per byte \(best so far\)", PAGE)[-1])
    assert last["tutorial"]["val/bits_per_byte"] == pytest.approx(said, abs=0.05)  # another Python has another text
    assert last["tutorial"]["val/loss"] < last["slower"]["val/loss"]
    (answers,) = (output for line, output in outputs.items() if "| minigpt chat" in line)
    assert "2019-03-07" in answers
    assert (tmp_path / "chat.html").is_file()
    assert (tmp_path / "runs" / "loss.png").is_file()
