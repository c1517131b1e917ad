"""Fixtures of several test modules: a little text, a tiny run, a small disk and a tiny model."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from support.runs import ROOT, finish

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network; an accidental request fails at once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side: more threads would only wait for each other


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 16 kB of sentences."""
    words = random.Random(0)
    nouns, verbs = ["cat", "dog", "bird", "fish", "tree"], ["sees", "hears", "follows", "likes"]
    lines = [f"The {words.choice(nouns)} {words.choice(verbs)} the {words.choice(nouns)}." for _ in range(700)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny_run(text_file: Path, cache_dir: Path, tmp_path: Path) -> list[str]:
    """The options of a run of twelve steps that takes a second, with dropout, into tmp_path/run."""
    return (
        f"--train_file {text_file} --tokenizer char --cache_dir {cache_dir} --output_dir {tmp_path / 'run'} "
        "--hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 --block_size 16 --dropout 0.1 "
        "--per_device_train_batch_size 4 --per_device_eval_batch_size 32 --max_steps 12 --warmup_steps 2 "
        "--learning_rate 1e-2 --logging_steps 1 --eval_steps 6 --save_steps 5 --save_total_limit 10 --save_best "
        "--sample_max_new_tokens 5 --report_to none --use_cpu"
    ).split()


@pytest.fixture
def train_here() -> Iterator[Callable[[list[str]], int]]:
    """Train in this process: takes options, returns the exit code."""
    from accelerate.state import AcceleratorState, GradientState

    from minigpt.config.parser import parse_arguments
    from train_accelerate import train

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(words: list[str]) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return train(parse_arguments(words, ROOT / "configs" / "quickstart.yaml"))

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """A file system of 16 MB, and a function that gives it another size in MB."""
    if sys.platform != "linux":
        pytest.skip("a small file system is made with Linux's tmpfs")
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"a file system cannot be mounted: {made.stderr.strip()}")

    def resize(megabytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={megabytes}m", folder], check=True)

    yield folder, resize
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def model() -> Any:
    """Two layers, 50 ids, a context of 64; random weights, always the same."""
    import torch

    from configuration_minigpt import MiniGPTConfig
    from modeling_minigpt import MiniGPTForCausalLM

    torch.manual_seed(0)
    config = MiniGPTConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
    )
    return MiniGPTForCausalLM(config).eval()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines of the trainers that experiments have started; forked from a process with the imports done."""
    commands: list[list[str]] = []

    def run(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
        commands.append(list(command))
        process = finish(list(command))
        return process.returncode, process.stdout + process.stderr

    monkeypatch.setattr("minigpt.experiments.runs._run", run)
    return commands
