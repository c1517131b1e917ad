"""Laws of work that is done once per host: by one process, without a time limit, with one outcome for all."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minigpt.config.parser import parse_arguments
from minigpt.data.prepare import prepared_folder
from minigpt.utils.lock import locked
from support.fork_server import finish_ranks, start_ranks
from support.runs import ROOT

WORKER = """
import os, sys, time
from pathlib import Path
from minigpt.utils.errors import UserError
from minigpt.utils.once_per_host import once_per_host

folder, kind = Path(sys.argv[1]), sys.argv[2]

def work():
    with (folder / "work").open("a") as file:
        file.write("x")
    if kind == "killed" and len((folder / "work").read_text()) == 1:
        os.kill(os.getpid(), 9)
    time.sleep(0.3)
    if kind == "refused":
        raise UserError("no such text")
    return str(os.getpid())

try:
    print(once_per_host(folder / "cache", "text", work))
except UserError as error:
    print(error)
"""


def launch(folder: Path, kind: str, port: str) -> list[str]:
    """The output of each of three processes of one launch, in any order; nothing for one that was killed."""
    environment = {**os.environ, "LOCAL_WORLD_SIZE": "3", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", WORKER, str(folder), kind]
    processes = [subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    return sorted(process.communicate(timeout=60)[0].strip() for process in processes)


@pytest.mark.parametrize(("kind", "calls"), [("done", 1), ("refused", 1), ("killed", 2)])
def test_one_process_works_and_all_have_its_outcome(tmp_path: Path, kind: str, calls: int) -> None:
    outputs = launch(tmp_path, kind, "1")
    assert len((tmp_path / "work").read_text()) == calls
    assert len(set(outputs[calls - 1 :])) == 1
    assert outputs[-1] == "no such text" if kind == "refused" else outputs[-1].isdigit()
    if kind != "killed":
        assert list((tmp_path / "cache").iterdir()) == []
    launch(tmp_path, kind, "2")
    assert len((tmp_path / "work").read_text()) == calls + 1  # another launch does the work again


def test_a_preparation_longer_than_the_timeout_of_the_ranks_only_delays_their_start(
    tiny_run: list[str], tmp_path: Path
) -> None:
    words = [*tiny_run, "--cache_dir", str(tmp_path / "cache"), "--max_steps", "2", "--ddp_timeout", "4"]
    folder = prepared_folder(parse_arguments(words))
    shutil.rmtree(folder)
    with locked(folder.parent / f".{folder.name}.lock", "the text"):  # as another process that prepares it does
        ranks = start_ranks([sys.executable, str(ROOT / "train_accelerate.py"), *words], 2)
        deadline = time.monotonic() + 60
        while not any("waiting for process" in rank.stderr() for rank in ranks):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(5)
        assert [rank.poll() for rank in ranks] == [None, None], [rank.stderr() for rank in ranks]
    code = finish_ranks(ranks, timeout=120)
    errors = [rank.stderr() for rank in ranks]
    assert code == 0, errors
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert sum("prepared in" in error for error in errors) == 1
