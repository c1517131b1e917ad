"""Laws of `minigpt train`: launcher options are separated from the trainer's, and the trainer's exit code is kept."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minigpt.training.launch import launch, split_words
from minigpt.utils.errors import UserError
from minigpt.utils.run_files import find_checkpoints
from support.runs import ROOT

MINIGPT = [sys.executable, "-m", "minigpt", "train"]
# two processes also meet what one meets
PROFILES = [pytest.param("cpu", marks=pytest.mark.slow), "cpu_ddp"]


def test_launcher_options_are_separated_from_the_trainers() -> None:
    words = "quickstart --num_processes 4 --max_steps 5 --multi_gpu --main_process_ip=10.0.0.1 --sample_prompts a b"
    launcher, trainer = split_words(words.split())
    assert launcher == ["--num_processes", "4", "--multi_gpu", "--main_process_ip=10.0.0.1"]
    assert trainer == ["quickstart", "--max_steps", "5", "--sample_prompts", "a", "b"]


def test_an_option_that_both_have_is_the_trainers() -> None:
    words = ["--mixed_precision", "bf16", "--gradient_accumulation_steps", "2", "--use_cpu"]
    assert split_words(words) == ([], words)


@pytest.mark.parametrize("profile", PROFILES)
def test_bad_input_is_one_line_and_exit_code_2(profile: str) -> None:
    words = [*MINIGPT, "quickstart", "--profile", profile, "--learning_rat", "1"]
    run = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert run.returncode == 2
    assert run.stderr.splitlines() == [
        "minigpt train: unknown option --learning_rat; did you mean --learning_rate?",
    ]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--profile", "singel_gpu", "did you mean single_gpu?"),
        ("--num_processes", "two", "--num_processes: invalid int value: 'two'"),
    ],
)
def test_bad_options_of_the_launcher_are_one_line(option: str, value: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        launch(*(("cpu", [option, value], []) if option != "--profile" else (value, [], [])))


@pytest.mark.parametrize("profile", PROFILES)
def test_a_signal_to_the_launcher_saves_a_checkpoint_and_exits_with_75(
    profile: str, tiny_run: list[str], tmp_path: Path
) -> None:
    """SIGTERM for one process, Ctrl-C for two; the launcher adds no traceback."""
    words = [*MINIGPT, "--profile", profile, *tiny_run, "--max_steps", "1000000", "--save_steps", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step ") and not process.poll():
            process.send_signal(signal.SIGTERM if profile == "cpu" else signal.SIGINT)
            break
    lines += process.stdout.readlines()
    assert process.wait(60) == 75, "".join(lines)
    assert len(find_checkpoints(tmp_path / "run")) == 1
    assert "Traceback" not in "".join(lines)
    assert lines[-1].startswith("stopped at step ")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    "profile", ["multi_gpu", *(pytest.param(name, marks=pytest.mark.slow) for name in ("single_gpu", "fsdp2"))]
)
def test_a_profile_for_gpus_does_not_train_on_the_cpu_instead(
    profile: str, tiny_run: list[str], tmp_path: Path
) -> None:
    words = [word for word in tiny_run if word != "--use_cpu"]
    processes = [] if profile == "single_gpu" else ["--num_processes", "2"]
    run = subprocess.run(
        [*MINIGPT, "--profile", profile, *processes, *words], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert line.startswith("minigpt train: the launch profile is for GPUs (mixed_precision: bf16)")
    assert not (tmp_path / "run").exists()


def test_a_bug_in_the_model_keeps_its_traceback_and_exits_with_1(tiny_run: list[str], tmp_path: Path) -> None:
    """A ValueError in the middle of training is a bug, whatever raised it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'train_accelerate' in ' '.join(sys.orig_argv):\n"
        "    import modeling_minigpt\n"
        "    forward, calls = modeling_minigpt.MiniGPTMLP.forward, []\n"
        "    def planted(self, *args):\n"
        "        calls.append(0)\n"
        "        if len(calls) > 9:\n"
        "            raise ValueError('planted')\n"
        "        return forward(self, *args)\n"
        "    modeling_minigpt.MiniGPTMLP.forward = planted\n",
        encoding="utf-8",
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    run = subprocess.run(
        [*MINIGPT, "--profile", "cpu", *tiny_run],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        timeout=120,
    )
    assert run.returncode == 1
    assert "ValueError: planted" in run.stderr
    assert "Traceback" in run.stderr
    assert "CalledProcessError" not in run.stderr
