"""Save one checkpoint, and print by how many MiB the memory of rank 0 grows for it. The options are the trainer's."""

import gc
import re
import sys
from pathlib import Path

import sharding_on_cpu  # noqa: F401
import torch

from minigpt.config.parser import parse_arguments
from minigpt.training.run_dir import OutputDir
from train_accelerate import set_up


def mebibytes(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


args = parse_arguments(sys.argv[1:])
with OutputDir(args) as output_dir:
    run = set_up(args, output_dir)
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()  # the moments exist from the first step on
    run.optimizer.zero_grad()
    gc.collect()
    run.accelerator.wait_for_everyone()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = mebibytes("VmRSS")
    run.checkpoints.save(run.state, run.model, run.optimizer, run.accelerator, stopping=True)
    if run.accelerator.is_main_process:
        print(f"grown by {mebibytes('VmHWM') - before:.0f} MiB")
