"""Build the optimizer: AdamW for all parameters, or Muon for the weight matrices of the layers."""

from typing import Any, cast

import torch
from torch import nn

from configuration_minigpt import MiniGPTConfig
from minigpt.config.arguments import OptimizerArguments
from minigpt.optim.muon import Muon

HEAD_MATRICES = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")  # Muon takes each head as a matrix of its own


def build_optimizer(model: nn.Module, args: OptimizerArguments, device: torch.device) -> torch.optim.Optimizer:
    """AdamW for all parameters; with `optimizer="muon"` Muon for the matrices of the layers and AdamW for the rest.

    Muon orthogonalizes the query and key matrices head by head, since the heads attend independently.
    Weight decay applies to matrices, not to biases and norms. `set_learning_rate` multiplies the scheduled rate by the
    `lr_ratio` of a group: that of Muon's matrices is muon_learning_rate / learning_rate, so both rates keep their
    ratio at every step.
    """
    matrices, vectors, layer_matrices, head_matrices = [], [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif args.optimizer == "muon" and name.endswith(HEAD_MATRICES):
            head_matrices.append(parameter)
        elif args.optimizer == "muon" and ".layers." in name:
            layer_matrices.append(parameter)
        else:
            matrices.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "fused": device.type in ("cpu", "cuda", "mps"),
    }
    if args.optimizer != "muon":
        return torch.optim.AdamW(groups, **options)
    muon_options: dict[str, Any] = {
        "weight_decay": args.weight_decay,
        "muon": True,
        "lr": args.muon_learning_rate,
        "lr_ratio": args.muon_learning_rate / args.learning_rate,
    }
    groups.append({"params": layer_matrices, **muon_options})
    if head_matrices:
        heads = cast(MiniGPTConfig, model.config).num_attention_heads
        groups.append({"params": head_matrices, **muon_options, "row_blocks": heads})
    return Muon(groups, args.muon_momentum, args.muon_ns_steps, **options)
