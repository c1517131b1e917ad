"""Laws of sharded training (FSDP2) and of DDP's gradients, with the trainer itself on gloo processes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from support import fork_server
from support.runs import ROOT, metrics
from support.sharding_on_cpu import FSDP2, hsdp

DDP: dict[str, str] = {}


@pytest.fixture
def words(tiny_run: list[str]) -> list[str]:
    """A run of six steps with eight micro-batches on one process, and no dropout, which differs between ranks."""
    index = tiny_run.index("--output_dir")
    options = ["--dropout", "0", "--max_steps", "6", "--save_steps", "3", "--eval_steps", "3"]
    return [*tiny_run[:index], *tiny_run[index + 2 :], *options, "--save_total_limit", "3"]


def train(
    words: list[str], run_dir: Path, processes: int, profile: dict[str, str], precision: str = "no"
) -> list[dict[str, Any]]:
    """Train with a global batch of 32; returns what the first rank holds after each backward pass."""
    report = run_dir.with_suffix(".report")
    accumulation = ["--gradient_accumulation_steps", str(8 // processes), "--output_dir", str(run_dir)]
    program = [sys.executable, str(ROOT / "tests" / "support" / "observed_trainer.py"), *words, *accumulation]
    environment = {**profile, "ACCELERATE_MIXED_PRECISION": precision, "REPORT": str(report)}
    ranks = fork_server.start_ranks(program, processes, environment)
    code = fork_server.finish_ranks(ranks, timeout=120)
    assert code == 0, "".join(rank.stderr() for rank in ranks)
    return [json.loads(line) for line in Path(f"{report}.0").read_text().splitlines()]


@pytest.mark.parametrize("optimizer", ["muon", pytest.param("adamw", marks=pytest.mark.slow)])
def test_two_sharded_ranks_train_as_one_process_and_resume_each_others_checkpoints(
    words: list[str], tmp_path: Path, optimizer: str
) -> None:
    words = [*words, "--optimizer", optimizer]
    alone, sharded = tmp_path / "alone", tmp_path / "sharded"
    train(words, alone, 1, DDP)
    train(words, sharded, 2, FSDP2)
    for name in ("train/loss", "val/loss", "train/grad_norm"):
        assert metrics(sharded, name) == pytest.approx(metrics(alone, name), abs=2e-6), name
    for start, processes, profile in ((alone, 2, FSDP2), (sharded, 1, DDP)):
        resumed = tmp_path / f"resumed-{processes}"
        train([*words, "--resume_from_checkpoint", str(start / "checkpoint-3")], resumed, processes, profile)
        losses = metrics(resumed, "train/loss")
        assert list(losses) == [4, 5, 6]
        # AdamW divides by the root of a second moment that may be as small as the difference of two sums
        assert losses == pytest.approx({step: metrics(alone, "train/loss")[step] for step in losses}, abs=2e-6)


@pytest.mark.parametrize("optimizer", ["muon", pytest.param("adamw", marks=pytest.mark.slow)])
def test_two_replicas_of_two_sharded_ranks_train_as_one_process(
    words: list[str], tmp_path: Path, optimizer: str
) -> None:
    words = [*words, "--optimizer", optimizer]
    train(words, tmp_path / "alone", 1, DDP)
    train(words, tmp_path / "replicas", 4, hsdp(2, 2))
    for name in ("train/loss", "val/loss", "train/grad_norm"):
        assert metrics(tmp_path / "replicas", name) == pytest.approx(metrics(tmp_path / "alone", name), abs=2e-6), name


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (hsdp(2, 4), "dp_replicate_size=2 times parallelism_config_dp_shard_size=4 must be num_processes=1"),
        (FSDP2 | {"PARALLELISM_CONFIG_TP_SIZE": "2"}, "parallelism_config_tp_size=2 must be 1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_in_one_line(
    words: list[str], tmp_path: Path, profile: dict[str, str], message: str
) -> None:
    program = [sys.executable, str(ROOT / "train_accelerate.py"), *words, "--output_dir", str(tmp_path / "run")]
    (process,) = fork_server.start_ranks(program, 1, profile)
    assert process.wait(60) == 2
    assert message in process.stderr().splitlines()[-1]
    assert "Traceback" not in process.stderr()


def test_gradients_are_summed_in_float32_and_stay_sharded_while_they_accumulate(
    words: list[str], tmp_path: Path
) -> None:
    """In bf16 the sums over four micro-batches and two ranks equal those of eight micro-batches on one rank."""
    held = train(words, tmp_path / "two", 2, FSDP2, "bf16")
    assert {(line["loss"], *line["gradients"]) for line in held} == {("torch.float32", "torch.float32")}
    assert max(line["bytes"] for line in held) <= 0.51 * held[0]["parameter_bytes"]
    one_rank = FSDP2 | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    one_rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(fork_server.free_port())}
    train(words, tmp_path / "one", 1, one_rank, "bf16")
    two, one = metrics(tmp_path / "two", "train/loss"), metrics(tmp_path / "one", "train/loss")
    assert two == pytest.approx(one, abs=2e-6)  # bf16 sums would differ by 1e-3


def test_ddp_holds_one_gradient_per_parameter_also_while_gradients_accumulate(
    words: list[str], tmp_path: Path
) -> None:
    held = train(words, tmp_path / "run", 2, DDP)
    after_the_first_step = held[4:]
    assert max(line["storages"] for line in after_the_first_step) <= 2  # DDP's buckets
    assert max(line["bytes"] for line in after_the_first_step) <= 1.05 * held[0]["parameter_bytes"]
