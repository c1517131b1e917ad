"""Name the options with which a run that ran out of memory does the same training in less."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils.memory import should_reduce_batch_size

from minigpt.config.arguments import Arguments
from minigpt.utils.errors import RunFailure, first_line


@contextmanager
def out_of_memory_names_a_way_out(args: Arguments) -> Iterator[None]:
    """Turn an out-of-memory error of the device into a RunFailure that names options for less memory."""
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise RunFailure(f"out of memory; {_way_out(args)} ({first_line(error)})") from error


def _way_out(args: Arguments) -> str:
    """What to change: first what leaves every step the same, then what makes the model smaller."""
    samples, micro_batches = args.per_device_train_batch_size, args.gradient_accumulation_steps
    ways = []
    if samples > 1:
        part = next(number for number in range(2, samples + 1) if samples % number == 0)
        ways.append(
            f"--per_device_train_batch_size {samples // part} --gradient_accumulation_steps {micro_batches * part}"
        )
    if args.gradient_checkpointing != "full":
        ways.append("--gradient_checkpointing full")
    if not ways:
        return "try a smaller --block_size or a smaller model; `minigpt plan` estimates the memory of a run"
    return f"the same training takes less with {', or with '.join(ways)}; `minigpt plan` estimates how much"
