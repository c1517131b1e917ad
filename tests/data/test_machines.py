"""Laws of a preparation by several machines: the bytes of one machine, also if any of them is killed."""

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from minigpt.data.tokenizer import train_characters
from support import fork_server
from support.fork_server import Process

MACHINES = 3
ROW_OF_MACHINE_1 = 300  # of two; it encodes the batch with this row
CHARACTERS = "abcdefghijklmnopqrstuvwxyz "


def text(generator: random.Random, characters: int) -> str:
    return "".join(generator.choices(CHARACTERS, k=characters))


def job(folder: Path, kind: str = "texts") -> list[str]:
    """The options of a preparation of some fifteen batches and more shards; "examples" have a loss mask."""
    generator = random.Random(0)
    lengths = [generator.randrange(30_000) for _ in range(1000)]
    lengths[500] = 2_500_000  # one document of several batches
    if kind == "examples":
        rows = [{"prompt": text(generator, 1 + n // 2), "completion": text(generator, 1 + n // 2)} for n in lengths]
    else:
        rows = [{"text": text(generator, length)} for length in lengths]
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_characters([CHARACTERS]).save_pretrained(folder / "tokenizer")
    return f"--train_file {file} --tokenizer {folder / 'tokenizer'} --shard_tokens 300000".split()


def prepare(words: list[str], output_dir: Path, rank: int = 0, machines: int = 1) -> Process:
    command = [sys.executable, "-m", "minigpt", "prepare", *words, "--output_dir", str(output_dir)]
    command += ["--preprocessing_num_workers", "1", "--num_machines", str(machines), "--machine_rank", str(rank)]
    return fork_server.start(command)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait_until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("kind", [pytest.param("texts", marks=pytest.mark.slow), "examples"])
def test_several_machines_write_the_bytes_of_one(kind: str, tmp_path: Path) -> None:
    words = job(tmp_path, kind)
    assert prepare(words, tmp_path / "expected").wait(60) == 0
    machines = [prepare(words, tmp_path / "out", rank, MACHINES) for rank in reversed(range(MACHINES))]
    for machine in machines:
        assert machine.wait(60) == 0, machine.stderr()
    shares = [int(machine.stderr().split(": ")[1].split()[0]) for machine in machines[:-1]]
    assert min(shares) > 0
    assert content(tmp_path / "out") == content(tmp_path / "expected")
    assert not (tmp_path / ".out.partial").exists()


def test_machines_that_are_killed_and_started_again_lose_nothing(tmp_path: Path) -> None:
    words, output_dir, partial = job(tmp_path), tmp_path / "out", tmp_path / ".out.partial"
    assert prepare(words, tmp_path / "expected").wait(60) == 0
    machines = [prepare(words, output_dir, rank, MACHINES) for rank in range(MACHINES)]
    wait_until((partial / "train-00000.bin").exists)
    machines[1].kill()
    wait_until((partial / "train-00002.bin").exists)
    machines[0].kill()
    machines[0].wait(60)
    assert not output_dir.exists()
    assert machines[2].wait(60) == 0
    machines[0] = prepare(words, output_dir, 0, MACHINES)
    wait_until(lambda: "resuming after" in machines[0].stderr())
    machines[0].kill()
    machines = [prepare(words, output_dir, rank, MACHINES) for rank in (0, 1)]
    for machine in machines:
        assert machine.wait(60) == 0, machine.stderr()
    assert content(output_dir) == content(tmp_path / "expected")
    late = prepare(words, output_dir, 2, MACHINES)
    assert late.wait(60) == 0
    assert "is complete already" in late.stderr()


def test_a_text_that_one_machine_cannot_encode_ends_all_with_its_error(tmp_path: Path) -> None:
    words = job(tmp_path)
    rows = (tmp_path / "data.jsonl").read_text().splitlines()
    rows[ROW_OF_MACHINE_1] = json.dumps({"text": "\u00e9"})
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    machines = [prepare(words, tmp_path / "out", rank, 2) for rank in range(2)]
    assert [machine.wait(60) for machine in machines] == [2, 2]
    problem = "the character 'é' (U+00E9) is not in the tokenizer's vocabulary"
    assert problem in machines[1].stderr().splitlines()[-1]
    assert machines[0].stderr().splitlines()[-1].startswith("minigpt prepare: machine 1: ")
    assert problem in machines[0].stderr()
    assert not any("Traceback" in machine.stderr() for machine in machines)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("machines", "rank"), [(2, 2), (0, 0), (2, -1)])
def test_a_rank_that_is_not_one_of_the_machines_is_refused(machines: int, rank: int, tmp_path: Path) -> None:
    process = prepare(["--train_file", "x"], tmp_path / "out", rank, machines)
    assert process.wait(60) == 2
    assert f"machine_rank={rank} must be at least 0 and below num_machines={machines}" in process.stderr()
