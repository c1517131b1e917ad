"""Laws of running out of memory: a run ends with one line, which names options for the same steps in less memory."""

import re
import sys
from functools import partial

import pytest

from minigpt.config.arguments import Arguments
from minigpt.training.out_of_memory import out_of_memory_names_a_way_out
from minigpt.utils.errors import EXIT_FAILURE, RunFailure
from support.runs import command, finish

MEMORY_BYTES = 6 * 2**30  # of a process; the logits of this run would take 24.6 GB
TOO_LARGE = ["--vocab_size", "400000", "--per_device_train_batch_size", "960"]


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


def test_only_options_that_are_left_are_named() -> None:
    message = failure(per_device_train_batch_size=1)
    assert "--gradient_checkpointing full" in message
    assert "batch_size" not in message
    message = failure(per_device_train_batch_size=1, gradient_checkpointing="full")
    assert "--block_size" in message
    assert "checkpointing" not in message


def test_another_error_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_names_a_way_out(Arguments(corpus="python-docs")):
        raise RuntimeError("shapes do not fit")


def failure(**options: object) -> str:
    """What a run with these options says if a GPU has no memory left."""
    args = Arguments(corpus="python-docs", **options)  # type: ignore[arg-type]
    with pytest.raises(RunFailure) as error, out_of_memory_names_a_way_out(args):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return str(error.value)
