"""Collect and restore the state of an optimizer, keyed by parameter name.

The keys are `<parameter>.<moment>`, for every wrapper of the model (DDP, FSDP2, torch.compile) and every number of
ranks. So a checkpoint can be resumed with another wrapper and another number of ranks.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

Tensors = dict[str, torch.Tensor]

_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def gather_weights(model: nn.Module) -> Tensors:
    """The weights in CPU memory, complete on rank 0; without the frozen ones. Every rank must call this.

    A model on the CPU shares its memory with the result.
    """
    state_dict: dict[str, Any] = get_model_state_dict(model, options=_GATHERED)
    # torch omits a frozen table under one of its names only; a tied one is the head as well
    frozen = [name for name, weight in model.named_parameters(remove_duplicate=False) if not weight.requires_grad]
    return {key: weight for key, weight in state_dict.items() if not any(name.endswith(key) for name in frozen)}


def gather_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimizer's state as `<parameter>.<moment>`, complete on rank 0. Every rank must call this."""
    state_dict: dict[str, Any] = get_optimizer_state_dict(model, _unwrapped(optimizer), options=_GATHERED)
    by_parameter: dict[str, Tensors] = state_dict.get("state", {})  # missing on other ranks than 0
    return {
        f"{parameter}.{moment}": value.contiguous()
        for parameter, moments in by_parameter.items()
        for moment, value in moments.items()
    }


def restore_moments(moments: Tensors, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load what `gather_moments` returned into `optimizer`, which may be wrapped or sharded in another way."""
    by_parameter: dict[str, Tensors] = {}
    for key, value in moments.items():
        parameter, moment = key.rsplit(".", 1)
        by_parameter.setdefault(parameter, {})[moment] = value
    unwrapped = _unwrapped(optimizer)
    groups = get_optimizer_state_dict(model, unwrapped)["param_groups"]
    state_dict: dict[str, Any] = {"state": by_parameter, "param_groups": groups}
    set_optimizer_state_dict(model, unwrapped, state_dict, options=StateDictOptions(full_state_dict=True))


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner
