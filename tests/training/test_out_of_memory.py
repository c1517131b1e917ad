"""Laws of running out of memory. Without a GPU, forward passes raise torch's error, and its recorder is fake."""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt.config.arguments import Arguments
from minigpt.config.parser import parse_arguments
from minigpt.training.out_of_memory import SNAPSHOT_EVENTS, out_of_memory_in_one_line, record_allocations
from minigpt.utils.errors import EXIT_FAILURE, RunFailure, UserError, one_line_errors
from modeling_minigpt import MiniGPTForCausalLM
from support.runs import command, finish, metrics

Train = Callable[[list[str]], int]

TORCH_MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.25 GiB is "
    "free. Including non-PyTorch memory, this process has 77.80 GiB memory in use. Of the allocated memory 74.00 GiB "
    "is allocated by PyTorch, and 3.00 GiB is reserved by PyTorch but unallocated."
)
REASON = TORCH_MESSAGE.partition(". Including")[0]
MEMORY_BYTES = 6 * 2**30  # of a process; the logits of this run would take 24.6 GB
TOO_LARGE = ["--vocab_size", "400000", "--per_device_train_batch_size", "960"]


class SmallGpu:
    """Lets a model make some forward passes, as if the memory of a GPU ran out in the one after."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, passes: int) -> None:
        self.passes, forward = passes, MiniGPTForCausalLM.forward

        def limited(*inputs: Any, **options: Any) -> Any:
            self.passes -= 1
            if self.passes < 0:
                raise torch.OutOfMemoryError(TORCH_MESSAGE)
            return forward(*inputs, **options)

        monkeypatch.setattr(MiniGPTForCausalLM, "forward", limited)


def test_a_run_that_is_out_of_memory_names_options_with_which_it_makes_the_same_steps(
    tiny_run: list[str], train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_run += ["--dropout", "0"]
    assert train_here(tiny_run) == 0
    losses = metrics(tmp_path / "run", "train/loss")
    with monkeypatch.context() as patch:
        SmallGpu(patch, passes=3)
        with pytest.raises(RunFailure) as failure:
            train_here([*tiny_run, "--overwrite_output_dir"])
    message = str(failure.value)
    assert message.startswith(f"{REASON}; try --per_device_train_batch_size 2 --gradient_accumulation_steps 2")
    assert "--per_device_eval_batch_size 4" in message
    assert "--gradient_checkpointing selective" in message
    assert message.endswith("--memory_snapshot records what the memory is used for")
    remedy = message.partition("; try ")[2].partition(" (")[0].split()
    assert train_here([*tiny_run, *remedy, "--overwrite_output_dir"]) == 0
    assert metrics(tmp_path / "run", "train/loss") == pytest.approx(losses, rel=1e-4)  # sums in another order


def test_a_run_that_cannot_be_made_smaller_is_told_so(tmp_path: Path) -> None:
    words = ["--per_device_train_batch_size", "1", "--gradient_checkpointing", "full", "--block_size", "64"]
    args = parse_arguments(["--output_dir", str(tmp_path / "run"), "--train_file", "text.txt", *words])
    match = "try --block_size 32 or the launch profile fsdp2"
    with pytest.raises(RunFailure, match=match), out_of_memory_in_one_line(args):
        raise torch.OutOfMemoryError(TORCH_MESSAGE)


def test_a_snapshot_is_recorded_from_the_start_and_written_where_the_memory_ran_out(
    tiny_run: list[str], train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"snapshot"))
    gpu = torch.device("cuda")
    monkeypatch.setattr("minigpt.training.accelerator.record_allocations", lambda device: record_allocations(gpu))
    assert train_here([*tiny_run, "--memory_snapshot"]) == 0
    assert calls == [{"max_entries": SNAPSHOT_EVENTS, "stacks": "python"}]
    run = tmp_path / "run"
    assert not (run / "profile").exists()  # the memory sufficed
    before = (run / "metrics.jsonl").read_bytes()

    SmallGpu(monkeypatch, passes=0)
    with pytest.raises(RunFailure) as failure:
        train_here([*tiny_run, "--memory_snapshot", "--overwrite_output_dir"])
    snapshot = run / "profile" / "memory_0.pickle"
    assert snapshot.read_bytes() == b"snapshot"
    assert f"open {snapshot} at https://pytorch.org/memory_viz" in str(failure.value)
    assert (run / "metrics.jsonl").read_bytes() == before  # the earlier run is back


def test_a_snapshot_without_a_gpu_is_refused_before_anything_is_written(
    tiny_run: list[str], train_here: Train, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="records the memory of a CUDA GPU, not of device=cpu; leave it out"):
        train_here([*tiny_run, "--memory_snapshot"])
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="device=mps"):
        record_allocations(torch.device("mps"))


def test_every_program_reports_a_full_gpu_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, one_line_errors("minigpt eval"):
        raise torch.OutOfMemoryError(TORCH_MESSAGE)
    assert ended.value.code == 1
    remedy = "use a smaller batch or shorter texts, or another device"
    assert capsys.readouterr().err == f"minigpt eval: {REASON}; {remedy}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is limited as Linux does it")
def test_a_run_without_enough_memory_ends_with_one_line(tiny_run: list[str]) -> None:
    import resource

    limit = partial(resource.setrlimit, resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    run = finish(command(*tiny_run, *TOO_LARGE), preexec_fn=limit)
    assert run.returncode == EXIT_FAILURE, run.stderr
    assert "--per_device_train_batch_size 480 --gradient_accumulation_steps 2" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("samples", [2, 7, 9, 12])
def test_the_options_that_are_named_make_steps_of_the_same_samples(samples: int) -> None:
    message = failure(per_device_train_batch_size=samples, gradient_accumulation_steps=5)
    named = re.search(r"--per_device_train_batch_size (\d+) --gradient_accumulation_steps (\d+)", message)
    assert named is not None
    assert int(named[1]) < samples
    assert int(named[1]) * int(named[2]) == samples * 5


def test_another_error_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_in_one_line(Arguments(corpus="python-docs")):
        raise RuntimeError("shapes do not fit")


def failure(**options: object) -> str:
    """What a run with these options says if a GPU has no memory left."""
    args = Arguments(corpus="python-docs", **options)  # type: ignore[arg-type]
    with pytest.raises(RunFailure) as error, out_of_memory_in_one_line(args):
        raise torch.OutOfMemoryError(TORCH_MESSAGE)
    return str(error.value)
