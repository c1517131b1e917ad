"""Collect weights and optimizer state for a checkpoint, and restore the latter, keyed by parameter name.

The keys of the optimizer state are `<parameter>.<moment>`, for every wrapper of the model (DDP, FSDP2, torch.compile)
and every number of ranks. So a checkpoint can be resumed with another wrapper and another number of ranks.
"""

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

Tensors = dict[str, torch.Tensor]

_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_AS_IT_IS = StateDictOptions(ignore_frozen_params=True)


def gather_weights(model: nn.Module) -> Tensors:
    """The weights in CPU memory, complete on rank 0; without the frozen ones. Every rank must call this.

    A model on the CPU shares its memory with the result.
    """
    return _trained_weights(model, _GATHERED)


def gather_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimizer's state as `<parameter>.<moment>`, complete on rank 0. Every rank must call this."""
    return {key: value.contiguous() for key, value in _moments(model, optimizer, _GATHERED).items()}


def share_of_weights(model: nn.Module, tied: Collection[str]) -> Tensors:
    """This rank's share of the weights of a sharded model, without those that are tied to others.

    Every rank must call this.
    """
    weights = _trained_weights(model, _AS_IT_IS)
    return _share({name: weight for name, weight in weights.items() if name not in tied})


def share_of_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """This rank's share of the state of a sharded optimizer, as `<parameter>.<moment>`. Every rank must call this."""
    return _share(_moments(model, optimizer, _AS_IT_IS))


def restore_moments(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the state of `optimizer` from a checkpoint, which may have been saved with another wrapper or sharding.

    Each rank reads the rows that it holds. Every rank must call this.
    """
    unwrapped = _unwrapped(optimizer)
    state_dict: dict[str, Any] = get_optimizer_state_dict(model, unwrapped)
    moments = _by_key(state_dict["state"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it is, in a single process
        reader = HuggingFaceStorageReader(str(checkpoint))
        dcp.load(moments, storage_reader=reader, no_dist=not dist.is_initialized())
    set_optimizer_state_dict(model, unwrapped, state_dict)


def _trained_weights(model: nn.Module, options: StateDictOptions) -> Tensors:
    state_dict: dict[str, Any] = get_model_state_dict(model, options=options)
    # torch omits a frozen table under one of its names only; a tied one is the head as well
    frozen = [name for name, weight in model.named_parameters(remove_duplicate=False) if not weight.requires_grad]
    return {key: weight for key, weight in state_dict.items() if not any(name.endswith(key) for name in frozen)}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer, options: StateDictOptions) -> Tensors:
    state_dict: dict[str, Any] = get_optimizer_state_dict(model, _unwrapped(optimizer), options=options)
    return _by_key(state_dict.get("state", {}))  # missing on other ranks than 0 if it is gathered there


def _by_key(by_parameter: Mapping[str, Tensors]) -> Tensors:
    return {
        f"{parameter}.{moment}": value
        for parameter, moments in by_parameter.items()
        for moment, value in moments.items()
    }


def _share(tensors: Tensors) -> Tensors:
    """Of tensors that are sharded over all ranks, about as many bytes for each rank: whole tensors, in CPU memory.

    Tensor by tensor, all ranks put it together and one keeps it. So no rank ever holds more than its share and a
    tensor.
    """
    owners = _owners({name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()})
    share = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if owners[name] == dist.get_rank():
            share[name] = whole.cpu().contiguous()
    return share


def _owners(sizes: Mapping[str, int]) -> dict[str, int]:
    """The rank that gets each tensor of some bytes: the largest first, to the rank with the least so far."""
    loads = [0] * dist.get_world_size()
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner
