"""Compare the tensors that two runs or checkpoints have saved."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def different_tensors(first: Path, second: Path, file: str = "model.safetensors") -> list[str]:
    """The names of the tensors of `file` that are not bit-identical in two folders, or are in one of them only.

    A sharded model has several such files, as model-00001-of-00002.safetensors.
    """
    left, right = (
        {
            name: tensor
            for path in folder.glob(f"{Path(file).stem}*.safetensors")
            for name, tensor in load_file(path).items()
        }
        for folder in (first, second)
    )
    assert left
    return sorted(
        name
        for name in left.keys() | right.keys()
        if name not in left or name not in right or not torch.equal(left[name], right[name])
    )
