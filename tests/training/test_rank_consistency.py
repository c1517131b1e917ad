"""Processes that do not mean the same run are told so, all of them, before anything is written."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.config.arguments import Arguments
from minigpt.training.rank_consistency import OWN_OPTIONS, WAY_OUT, first_difference
from support.runs import ROOT, finish


def run_two_hosts(first: list[str], second: list[str], *roots: Path) -> list[tuple[int, str]]:
    """Start one process of two on each of two hosts, by hand; returns the exit code and the errors of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    processes = []
    for rank, (words, root) in enumerate(zip((first, second), roots or (ROOT, ROOT), strict=True)):
        environment = {**os.environ, **world, "RANK": str(rank), "PYTHONPATH": str(root)}
        script = [sys.executable, str(root / "train_accelerate.py"), *words]
        processes.append(subprocess.Popen(script, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


def assert_both_refuse(outcome: list[tuple[int, str]], *parts: str) -> None:
    """Both ended with 2, after the same line that holds `parts`."""
    lines = [next(line for line in error.splitlines() if "process 1 has" in line) for _, error in outcome]
    assert [code for code, _ in outcome] == [2, 2], outcome
    assert lines[0] == lines[1]
    assert not [error for _, error in outcome if "Traceback" in error]
    for part in parts:
        assert part in lines[0]


def test_hosts_with_other_options_are_refused_before_anything_is_written(tiny_run: list[str], tmp_path: Path) -> None:
    outcome = run_two_hosts(tiny_run, [*tiny_run, "--learning_rate", "0.002", "--seed", "7"])
    assert_both_refuse(
        outcome,
        "process 1 has learning_rate=0.002 where process 0 has 0.01, and seed=7 where process 0 has 1337; ",
        "start every host with the same options",
    )
    assert not (tmp_path / "run").exists()


def test_hosts_with_other_data_are_refused(tiny_run: list[str], text_file: Path, tmp_path: Path) -> None:
    text = tmp_path / "other.txt"
    text.write_text(text_file.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    outcome = run_two_hosts(tiny_run, [*tiny_run, "--train_file", str(text)])
    assert_both_refuse(outcome, "process 1 has data_fingerprint=", "give every host the same text and tokenizer")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_hosts_with_other_code_are_refused(tiny_run: list[str], tmp_path: Path) -> None:
    other = tmp_path / "checkout"
    shutil.copytree(ROOT / "minigpt", other / "minigpt")
    for path in [*ROOT.glob("*.py"), ROOT / "configs"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, other / path.name)
    with (other / "minigpt" / "schedule.py").open("a", encoding="utf-8") as file:
        file.write("# something else\n")
    outcome = run_two_hosts(tiny_run, tiny_run, ROOT, other)
    assert_both_refuse(outcome, "process 1 has code=", "give every host the same code")


@pytest.mark.slow
def test_a_host_that_cannot_see_the_checkpoints_is_refused(tiny_run: list[str], tmp_path: Path) -> None:
    assert finish([sys.executable, str(ROOT / "train_accelerate.py"), *tiny_run]).returncode == 0
    words = [*tiny_run, "--max_steps", "20", "--resume_from_checkpoint", "latest"]
    outcome = run_two_hosts(words, [*words, "--output_dir", str(tmp_path / "unshared")])
    assert_both_refuse(
        outcome, "process 1 has resumed_step=0 where process 0 has 12", "put output_dir on a disk that all hosts share"
    )
    assert not (tmp_path / "unshared").exists()


@pytest.mark.slow
def test_hosts_may_differ_in_where_things_lie(tiny_run: list[str], text_file: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copy(text_file, tmp_path / "copy.txt")
    outcome = run_two_hosts(tiny_run, [*tiny_run, "--train_file", str(elsewhere), "--dataloader_num_workers", "1"])
    assert [code for code, _ in outcome] == [0, 0], outcome
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_every_subject_is_compared_and_the_first_process_that_differs_is_named() -> None:
    alike = {subject: {"it": 1} for subject in WAY_OUT}
    assert first_difference([alike, alike, alike]) is None
    for subject, way_out in WAY_OUT.items():
        other = {**alike, subject: {"it": 2}}
        assert first_difference([alike, alike, other, other]) == (
            f"process 2 has it=2 where process 0 has 1; {way_out}"
        )


def test_options_that_may_differ_exist() -> None:
    assert set(Arguments.__dataclass_fields__) >= OWN_OPTIONS
