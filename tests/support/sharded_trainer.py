"""The trainer, under FSDP2 on the CPU too. It kills itself while it saves a checkpoint, if $KILLED_AT says so."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sharding_on_cpu  # noqa: F401

from minigpt.training import sharded_checkpoint
from train_accelerate import main

KILLED_AT: dict[str, Any] = json.loads(os.environ.get("KILLED_AT", "{}"))


def killed_before(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
    """`function`, before which this process is killed in that phase of saving that step."""

    def run(*args: Any, **options: Any) -> Any:
        is_step = any(str(value).count(f"checkpoint-{KILLED_AT['step']}") for value in args if isinstance(value, Path))
        if is_step and os.environ.get("RANK") == str(KILLED_AT["rank"]) and KILLED_AT["phase"] == phase:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    return run


def killed_at_optimizer(tensors: Any, path: Path, **options: Any) -> None:
    kind = "optimizer's" if path.name.startswith("optimizer") else "model's"
    killed_before(save_file, f"before the {kind} share")(tensors, path, **options)


if KILLED_AT:
    write = sharded_checkpoint.ShardedWriter.write
    sharded_checkpoint.ShardedWriter.write = killed_before(write, "before the folder")  # type: ignore[method-assign]
    save_file, sharded_checkpoint.save_file = sharded_checkpoint.save_file, killed_at_optimizer
    for name, phase in (("_seal", "before the seal"), ("publish_folder", "before it appears")):
        setattr(sharded_checkpoint, name, killed_before(getattr(sharded_checkpoint, name), phase))
main()
