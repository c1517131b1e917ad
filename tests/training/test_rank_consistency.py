"""Laws of the comparison of ranks: any difference ends all of them with one message, before anything is written."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.config.arguments import Arguments
from minigpt.training.rank_consistency import (
    HOST_OPTIONS,
    PACKAGE,
    ROOT_MODULES,
    WAY_OUT,
    code_fingerprint,
    first_difference,
)
from support.runs import ROOT, finish


def run_two_hosts(first: list[str], second: list[str], *roots: Path) -> list[tuple[int, str]]:
    """Start one of two ranks on each of two hosts, without a launcher. Returns the exit code and stderr of each."""
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
    """Both ranks exited with 2 after the same message, which contains `parts`."""
    messages = [next(line for line in error.splitlines() if "rank 1 has" in line) for _, error in outcome]
    assert [code for code, _ in outcome] == [2, 2], outcome
    assert messages[0] == messages[1]
    assert not [error for _, error in outcome if "Traceback" in error]
    for part in parts:
        assert part in messages[0]


def test_hosts_with_other_options_are_refused_before_anything_is_written(tiny_run: list[str], tmp_path: Path) -> None:
    outcome = run_two_hosts(tiny_run, [*tiny_run, "--learning_rate", "0.002", "--seed", "7"])
    assert_both_refuse(
        outcome,
        "rank 1 has learning_rate=0.002 where rank 0 has 0.01, and seed=7 where rank 0 has 1337; ",
        "start every host with the same options",
    )
    assert not (tmp_path / "run").exists()


def test_hosts_with_other_data_are_refused(tiny_run: list[str], text_file: Path, tmp_path: Path) -> None:
    text = tmp_path / "other.txt"
    text.write_text(text_file.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    outcome = run_two_hosts(tiny_run, [*tiny_run, "--train_file", str(text)])
    assert_both_refuse(outcome, "rank 1 has data_fingerprint=", "give every host the same text and tokenizer")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_hosts_with_other_code_are_refused(tiny_run: list[str], tmp_path: Path) -> None:
    copy = tmp_path / "checkout"
    for path in [PACKAGE, ROOT / "configs", *ROOT.glob("*.py")]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, copy / path.relative_to(ROOT))
    with (copy / "minigpt" / "optim" / "lr_schedule.py").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    outcome = run_two_hosts(tiny_run, tiny_run, ROOT, copy)
    assert_both_refuse(outcome, "rank 1 has code=", "give every host the same code")


@pytest.mark.slow
def test_a_host_that_cannot_see_the_checkpoints_is_refused(tiny_run: list[str], tmp_path: Path) -> None:
    assert finish([sys.executable, str(ROOT / "train_accelerate.py"), *tiny_run]).returncode == 0
    words = [*tiny_run, "--max_steps", "20", "--resume_from_checkpoint", "latest"]
    outcome = run_two_hosts(words, [*words, "--output_dir", str(tmp_path / "unshared")])
    assert_both_refuse(
        outcome, "rank 1 has resumed_step=0 where rank 0 has 12", "put output_dir on a disk that all hosts share"
    )
    assert not (tmp_path / "unshared").exists()


@pytest.mark.slow
def test_hosts_may_differ_in_paths_and_workers(tiny_run: list[str], text_file: Path, tmp_path: Path) -> None:
    copy = shutil.copy(text_file, tmp_path / "copy.txt")
    outcome = run_two_hosts(tiny_run, [*tiny_run, "--train_file", str(copy), "--dataloader_num_workers", "1"])
    assert [code for code, _ in outcome] == [0, 0], outcome
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_every_subject_is_compared_and_the_first_rank_that_differs_is_named() -> None:
    facts = {subject: {"fact": 1} for subject in WAY_OUT}
    assert first_difference([facts, facts, facts]) is None
    for subject, way_out in WAY_OUT.items():
        for other_fact in ({"fact": 2}, {}):
            other = {**facts, subject: other_fact}
            assert first_difference([facts, facts, other, other]) == (
                f"rank 2 has fact={other_fact.get('fact')} where rank 0 has 1; {way_out}"
            )


def test_a_change_to_any_module_or_a_move_to_another_room_changes_the_fingerprint(tmp_path: Path) -> None:
    package = tmp_path / PACKAGE.name
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ROOT_MODULES:
        shutil.copy(ROOT / name, tmp_path / name)
    original = code_fingerprint(package)
    fingerprints = {original}
    modules = list(tmp_path.rglob("*.py"))
    for module in modules:
        content = module.read_bytes()
        module.write_bytes(content + b"\n# changed\n")
        fingerprints.add(code_fingerprint(package))
        module.write_bytes(content)
    rooms = sorted(path.parent for path in package.glob("*/__init__.py"))
    moves = [(max(room.glob("[!_]*.py")), target) for room, target in zip(rooms, rooms[1:] + rooms[:1], strict=True)]
    for module, room in moves:
        moved = module.rename(room / module.name)
        fingerprints.add(code_fingerprint(package))
        moved.rename(module)
    assert len(fingerprints) == 1 + len(modules) + len(moves)
    assert code_fingerprint(package) == original


def test_options_that_may_differ_exist() -> None:
    assert set(Arguments.__dataclass_fields__) >= HOST_OPTIONS
