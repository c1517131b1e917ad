"""Build the optimizer: AdamW, or Muon for the layers' matrices."""

from typing import Any

import torch
from torch import nn

from minigpt.config.arguments import OptimizerArguments
from minigpt.optim.muon import Muon


def build_optimizer(model: nn.Module, args: OptimizerArguments, device: torch.device) -> torch.optim.Optimizer:
    """AdamW, or Muon with AdamW for all that is no matrix of a layer. Matrices decay; biases and norms do not.

    Every group's rate is the schedule's times its `lr_ratio`.
    """
    matrices, vectors, hidden_matrices = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif args.optimizer == "muon" and ".layers." in name:
            hidden_matrices.append(parameter)
        else:
            matrices.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if args.optimizer == "muon":
        muon = {"muon": True, "lr": args.muon_learning_rate, "lr_ratio": args.muon_learning_rate / args.learning_rate}
        groups.append({"params": hidden_matrices, "weight_decay": args.weight_decay, **muon})
    options: dict[str, Any] = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "fused": device.type in ("cpu", "cuda", "mps"),
    }
    if args.optimizer == "muon":
        return Muon(groups, args.muon_momentum, **options)
    return torch.optim.AdamW(groups, **options)
