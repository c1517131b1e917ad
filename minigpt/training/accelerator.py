"""Start Accelerate with the settings of the launch profile and the options, and share work between its processes."""

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    gather_object,
)

from minigpt.config.arguments import Arguments
from minigpt.training.run_log import requested_trackers
from minigpt.utils.errors import UserError
from minigpt.utils.malloc import keep_freed_memory

Result = TypeVar("Result")


def start_accelerator(args: Arguments) -> Accelerator:
    """The Accelerator with the processes, device, precision and compilation of the launch profile.

    Raises UserError for an option that this device does not support.
    """
    accelerator = Accelerator(
        cpu=args.use_cpu or not torch.accelerator.is_available(),  # without it, CPU processes would not form a group
        mixed_precision=args.mixed_precision,
        log_with=list(requested_trackers(args.report_to)) or None,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(args.run_dir / "tensorboard")
        ),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=args.ddp_timeout)),
            AutocastKwargs(cache_enabled=False),  # a pass uses each weight once: cached copies only take memory
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=True, comm_hook=DDPCommunicationHookType(args.ddp_comm_hook)
            ),
        ],
    )
    if accelerator.device.type == "cpu":
        if args.ddp_comm_hook == "bf16":
            raise UserError("ddp_comm_hook=bf16 needs a GPU; use fp16 or no")
        keep_freed_memory()
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    return accelerator


def read_once_per_host(accelerator: Accelerator, read: Callable[[], Result]) -> Result:
    """What `read` returns in the first process of this host, such as the hashes of large files. All must call this.

    Raises the UserError of any host in every process.
    """
    if accelerator.num_processes == 1:
        return read()
    outcome: tuple[Result | None, UserError | None] = None, None
    if accelerator.is_local_main_process:
        try:
            outcome = read(), None
        except UserError as error:
            outcome = None, error
    outcomes = gather_object([outcome])
    for _, refusal in outcomes:
        if refusal is not None:
            raise refusal
    result: Result = outcomes[accelerator.process_index - accelerator.local_process_index][0]
    return result
