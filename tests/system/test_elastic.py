"""A process that dies is started again by the launcher, and the run goes on by itself."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minigpt.utils.run_files import find_checkpoints
from support.runs import command, finish, metrics


def workers_of(launcher: int) -> list[int]:
    """The process ids of a launcher's workers, in the order in which they started."""
    tasks = Path(f"/proc/{launcher}/task").iterdir()
    children = [int(word) for task in tasks for word in (task / "children").read_text().split()]
    return sorted(pid for pid in children if b"train_accelerate" in Path(f"/proc/{pid}/cmdline").read_bytes())


def start(launch: list[str]) -> "subprocess.Popen[str]":
    """The launch as docs/clusters.md gives it, with restarts; without the two settings restarted workers may hang."""
    place = launch.index("--num_processes")
    launch = [*launch[:place], "--max_restarts", "3", "--rdzv_backend", "c10d", *launch[place:]]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PET_RDZV_ENDPOINT": "localhost:0"}
    pipe = subprocess.PIPE
    return subprocess.Popen(launch, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the workers in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_is_killed_is_started_again_and_the_run_ends_as_if_nothing_had_happened(
    tiny_run: list[str], tmp_path: Path, rank: int
) -> None:
    words = [*tiny_run, "--max_steps", "300", "--save_steps", "20", "--eval_steps", "0"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    reference = finish(command(*words, "--output_dir", straight, processes=2))
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
    assert output.count("goes on from") == 1
    assert metrics(killed, "train/loss") == metrics(straight, "train/loss")
    left, right = load_file(killed / "model.safetensors"), load_file(straight / "model.safetensors")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_is_not_started_again(tiny_run: list[str], tmp_path: Path) -> None:
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
