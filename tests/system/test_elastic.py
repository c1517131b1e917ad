"""Laws of restarts: the launcher starts a killed worker again, and the run resumes without a user."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from minigpt.utils.run_files import find_checkpoints
from support.runs import command, finish, metrics
from support.tensors import different_tensors


def workers_of(launcher: int) -> list[int]:
    """The process ids of a launcher's workers, in the order of their start."""
    tasks = Path(f"/proc/{launcher}/task").iterdir()
    children = [int(word) for task in tasks for word in (task / "children").read_text().split()]
    return sorted(pid for pid in children if b"train_accelerate" in Path(f"/proc/{pid}/cmdline").read_bytes())


def start(launch: list[str]) -> "subprocess.Popen[str]":
    """Launch with restarts, as in docs/clusters.md. Without the two variables restarted workers may hang."""
    index = launch.index("--num_processes")
    launch = [*launch[:index], "--max_restarts", "3", "--rdzv_backend", "c10d", *launch[index:]]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PET_RDZV_ENDPOINT": "localhost:0"}
    pipe = subprocess.PIPE
    return subprocess.Popen(launch, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the workers in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_with_a_killed_and_restarted_worker_equals_an_uninterrupted_one(
    tiny_run: list[str], tmp_path: Path, rank: int
) -> None:
    words = [*tiny_run, "--max_steps", "300", "--save_steps", "20", "--eval_steps", "0"]
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    reference = finish(command(*words, "--output_dir", uninterrupted, processes=2))
    assert reference.returncode == 0, reference.stderr

    launch = command(*words, "--output_dir", killed, "--resume_from_checkpoint", "latest", processes=2)
    with start(launch) as launcher:
        deadline = time.monotonic() + 240
        while not (killed / "checkpoint-40").exists():
            assert launcher.poll() is None, launcher.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(workers_of(launcher.pid)[rank], signal.SIGKILL)
        output, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, errors
    assert output.count("resuming from") == 1
    assert metrics(killed, "train/loss") == metrics(uninterrupted, "train/loss")
    assert different_tensors(killed, uninterrupted) == []


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_is_not_restarted(tiny_run: list[str], tmp_path: Path) -> None:
    launch = command(*tiny_run, "--max_steps", "100000", "--save_steps", "0", "--eval_steps", "0", processes=2)
    with start(launch) as launcher:
        deadline = time.monotonic() + 240
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        launcher.send_signal(signal.SIGTERM)
        output, _ = launcher.communicate(timeout=240)
    assert launcher.returncode != 0
    assert output.count("stopped at step") == 1
    (checkpoint,) = find_checkpoints(tmp_path / "run")
    state = json.loads((checkpoint / "training_state.json").read_text())
    assert state["step"] == max(metrics(tmp_path / "run", "train/loss"))
