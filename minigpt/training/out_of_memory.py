"""When memory runs out: one line that says what to change, and a snapshot of what the memory of a GPU held."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import should_reduce_batch_size

from minigpt.config.arguments import Arguments
from minigpt.utils.errors import RunFailure, UserError, out_of_memory_reason
from minigpt.utils.run_files import PROFILE_DIR

SNAPSHOT_EVENTS = 100_000  # the last allocations and frees that a snapshot has


def record_allocations(device: torch.device) -> None:
    """Keep a history of the allocations on a GPU, with the Python code that made each one.

    To be called before the first of them. Raises UserError on other devices.
    """
    if device.type != "cuda":
        raise UserError(f"memory_snapshot records the memory of a CUDA GPU, not of device={device.type}; leave it out")
    torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_EVENTS, stacks="python")


@contextmanager
def out_of_memory_in_one_line(args: Arguments) -> Iterator[None]:
    """Turn an out-of-memory error of a training into a RunFailure that says what to change.

    With `memory_snapshot`, each rank that has the error first writes profile/memory_<rank>.pickle. This context
    belongs outside that of the output folder, which takes back what a start that failed has written.
    """
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        is_gpu = isinstance(error, torch.OutOfMemoryError)
        snapshot = "; --memory_snapshot records what the memory is used for" if is_gpu else ""
        folder = args.run_dir / PROFILE_DIR
        if is_gpu and args.memory_snapshot and args.run_dir.is_dir():
            folder.mkdir(exist_ok=True)
            path = folder / f"memory_{os.environ.get('RANK', '0')}.pickle"
            torch.cuda.memory._dump_snapshot(str(path))
            snapshot = f"; what the memory was used for: open {path} at https://pytorch.org/memory_viz"
        raise RunFailure(f"{out_of_memory_reason(error)}; try {' or '.join(_remedies(args))}{snapshot}") from error


def _remedies(args: Arguments) -> list[str]:
    """Options that need less memory than those of the run, the cheapest first."""
    batch, remedies = args.per_device_train_batch_size, []
    if batch > 1:
        parts = next(number for number in range(2, batch + 1) if batch % number == 0)
        accumulation = args.gradient_accumulation_steps * parts
        remedies.append(
            f"--per_device_train_batch_size {batch // parts} --gradient_accumulation_steps {accumulation} "
            "(the same steps)"
        )
    if args.eval_batch_size > batch:
        remedies.append(f"--per_device_eval_batch_size {batch}")
    if args.gradient_checkpointing != "full":
        remedies.append(f"--gradient_checkpointing {'selective' if args.gradient_checkpointing == 'no' else 'full'}")
    return remedies or [f"--block_size {max(1, args.block_size // 2)}", "the launch profile fsdp2 with more GPUs"]
