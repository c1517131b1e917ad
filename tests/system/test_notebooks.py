"""The notebooks in examples/ run from top to bottom, in an empty folder, as they would on a fresh machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.environments import environment
from support.runs import ROOT

EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=1200, kernel_name="python3").execute()
print(nbformat.writes(notebook))
"""


@pytest.mark.slow
def test_the_notebooks_run_one_after_the_other(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second and the third use the model of the first."""
    python = environment(tmp_path_factory, "notebooks", ["nbclient", "ipykernel"])
    paths = [str(Path(python).parent), str(Path(sys.executable).parent), os.environ["PATH"]]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # one test at a time has all cores
    settings = os.environ | {"PATH": os.pathsep.join(paths), "PYTHONPATH": str(ROOT)}
    for name in ("quickstart", "chat", "inside"):
        words = [python, "-c", EXECUTE, str(ROOT / "examples" / f"{name}.ipynb")]
        done = subprocess.run(words, cwd=tmp_path, env=settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        cells = json.loads(done.stdout)["cells"]
        assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code")
    assert (tmp_path / "runs" / "quickstart_chat" / "config.json").is_file()
