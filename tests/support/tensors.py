"""Compare the tensors that two runs or checkpoints have saved."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def different_tensors(first: Path, second: Path, file: str = "model.safetensors") -> list[str]:
    """The names of the tensors of `file` that are not bit-identical in two folders, or are in one of them only."""
    left, right = load_file(first / file), load_file(second / file)
    return sorted(
        name
        for name in left.keys() | right.keys()
        if name not in left or name not in right or not torch.equal(left[name], right[name])
    )
