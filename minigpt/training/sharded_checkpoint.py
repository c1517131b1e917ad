"""Write the checkpoint of a sharded model: all ranks write at the same time, each its share of the tensors.

A share is whole tensors. So the files are those of any large model of transformers, `model-00001-of-00008.safetensors`
with an index, which `from_pretrained` loads, and next to them `optimizer-00001-of-00008.safetensors`.
"""

import json
import shutil
from collections import ChainMap
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from minigpt.training.checkpoint_files import checksum, remove_leftovers, write_checksums
from minigpt.training.optimizer_state import Tensors
from minigpt.training.optional_files import SMALL_FILES_BYTES
from minigpt.utils.files import is_disk_full, lack_of_room, publish_folder
from minigpt.utils.formatting import format_bytes

Value = TypeVar("Value")


def is_sharded(model: nn.Module) -> bool:
    """Whether no rank has the whole model."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters()) and dist.get_world_size() > 1


class ShardedWriter:
    """Writes checkpoints together with the other ranks, also in a thread: it has a process group of its own."""

    def __init__(self, timeout: timedelta) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()

    def write(
        self, folder: Path, weights: Tensors, moments: Tensors, write_other_files: Callable[[Path], None]
    ) -> str | None:
        """Write a checkpoint, of which this rank has a share. `folder` appears when all ranks have written theirs.

        Every rank must call this. `write_other_files` writes everything but the tensors into a folder, on rank 0.
        Returns a sentence on rank 0 if there is no room; then there is no folder.
        """
        unfinished = folder.with_name(f".writing-{folder.name}")
        needed = sum(self._exchange(_bytes(weights) + _bytes(moments))) + SMALL_FILES_BYTES
        problem = None
        if self._rank == 0:
            remove_leftovers(folder.parent)
            problem = lack_of_room(folder.parent, needed)
            if problem is None:
                problem = _unless_full(folder.parent, needed, lambda: write_other_files(unfinished))
        if self._exchange(problem)[0] is None:
            part = f"-{self._rank + 1:05d}-of-{self._ranks:05d}.safetensors"
            checksums: dict[str, dict[str, Any]] = {}

            def write_share() -> None:
                for name, tensors in ((f"model{part}", weights), (f"optimizer{part}", moments)):
                    if tensors:
                        save_file(tensors, unfinished / name, metadata={"format": "pt"})
                        checksums[name] = checksum(unfinished / name)

            problem = _unless_full(folder.parent, needed, write_share)
            problems, parts, files, sizes = zip(
                *self._exchange((problem, checksums, dict.fromkeys(weights, f"model{part}"), _bytes(weights))),
                strict=True,
            )
            problem = next(filter(None, problems), None)
            if problem is None and self._rank == 0:
                index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(ChainMap(*files))}
                problem = _unless_full(folder.parent, needed, lambda: _seal(unfinished, index, dict(ChainMap(*parts))))
        if self._rank != 0:
            return None
        if problem is None:
            publish_folder(unfinished, folder)
        else:
            shutil.rmtree(unfinished, ignore_errors=True)
        return problem

    def _exchange(self, value: Value) -> list[Value]:
        """The values of all ranks."""
        values: list[Any] = [None] * self._ranks
        dist.all_gather_object(values, value, group=self._group)
        return values


def _seal(folder: Path, index: dict[str, Any], checksums: dict[str, dict[str, Any]]) -> None:
    """Write the index of the weights, and the checksums: those of the shares, and those of the other files."""
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
    write_checksums(folder, checksums)


def _unless_full(folder: Path, needed: int, write: Callable[[], None]) -> str | None:
    """Call `write`. Returns a sentence if the disk is full."""
    try:
        write()
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        return f"the disk of {folder} is full; {format_bytes(needed)} are needed"
    return None


def _bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
