"""How does a gradient become an update? AdamW as GPT-3 used it, or Muon for the layers' matrices."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from minigpt.arguments import OptimizerArguments


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


NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315


class Muon(torch.optim.AdamW):
    """AdamW whose groups marked `muon` take a step of equal size in every direction of a matrix instead.

    The momentum of a matrix is replaced by the nearest semi-orthogonal matrix before it is applied. Matrices of one
    shape are orthogonalised together. Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
    """

    param_groups: list[dict[str, Any]]

    def __init__(self, params: Iterable[dict[str, Any]], momentum: float, **defaults: Any) -> None:
        super().__init__(params, **defaults)
        self.momentum = momentum
        for group in self.param_groups:
            group.setdefault("muon", False)
        # AdamW's fused kernel can undo fp16's loss scale by itself; the matrices cannot, so the scaler has to do it
        self._step_supports_amp_scaling = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's own wants a step count in the state of a matrix too

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._muon_step(group)
        return loss

    def _muon_step(self, group: dict[str, Any]) -> None:
        same_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                same_shape[parameter.shape].append(parameter)
        for (rows, columns), parameters in same_shape.items():
            momenta = [
                self.state[parameter].setdefault("momentum", torch.zeros_like(parameter)) for parameter in parameters
            ]
            gradients = [parameter.grad for parameter in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
            nesterov = torch._foreach_lerp(gradients, momenta, self.momentum)
            directions = orthogonalize(torch.stack(nesterov))
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            scale = max(1.0, rows / columns) ** 0.5  # the same root-mean-square update for every shape
            torch._foreach_add_(parameters, list(directions.unbind()), alpha=-group["lr"] * scale)


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Semi-orthogonal matrices near `matrices` [N, rows, columns]: singular values of about 0.7 to 1.2.

    Newton–Schulz iteration with the coefficients of Jordan et al. 2024; in bfloat16 on a GPU, where it is fast. In
    float32 a matrix of another shape than square is multiplied once, by the product of all its steps' polynomials.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    wide = x.shape[-2] <= x.shape[-1]
    if not wide:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if x.dtype == torch.float32 and x.shape[-2] < x.shape[-1]:
        x = _polynomials(x @ x.mT, steps) @ x
    else:
        for _ in range(steps):
            gram = x @ x.mT
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


def _polynomials(gram: torch.Tensor, steps: int) -> torch.Tensor:
    """The product of the polynomials that `steps` steps multiply X with, from X @ X.mT [N, rows, rows]."""
    a, b, c = NEWTON_SCHULZ
    product = torch.eye(gram.shape[-1], device=gram.device)
    for _ in range(steps):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
    return product
