"""Muon: momentum whose update is orthogonalized.

Shapes: N matrices of one shape [rows, columns]; P processes.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315


class Muon(torch.optim.AdamW):
    """AdamW whose groups marked `muon` take a step of equal size in every direction of a matrix instead.

    The momentum of a matrix is replaced by the nearest semi-orthogonal matrix before it is applied. Matrices of one
    shape are orthogonalised together, and shared out: with P processes each works on 1/P of them, whether it holds
    them whole (data parallel) or some rows of each (FSDP2). Every process has to take every step.
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
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
            momenta = [_here(self._momentum(parameter)) for parameter in parameters]
            gradients = [_here(parameter.grad) for parameter in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
            nesterov = torch.stack(torch._foreach_lerp(gradients, momenta, self.momentum))
            if isinstance(parameters[0], DTensor):
                directions = orthogonalize_rows(nesterov, rows, _sharding_group(parameters[0]))
            else:
                directions = orthogonalize_copies(nesterov)
            weights = [_here(parameter) for parameter in parameters]
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            scale = max(1.0, rows / columns) ** 0.5  # the same root-mean-square update for every shape
            torch._foreach_add_(weights, list(directions.unbind()), alpha=-group["lr"] * scale)

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"]
        return momentum


def _here(tensor: Any) -> Tensor:
    """What this process holds of a tensor, sharded or not; the same memory."""
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local


def _sharding_group(parameter: DTensor) -> Any:
    """The processes that hold the rows of `parameter` between them."""
    (dimension,) = (number for number, placement in enumerate(parameter.placements) if placement.is_shard(0))
    return parameter.device_mesh.get_group(dimension)


def orthogonalize_copies(matrices: Tensor) -> Tensor:
    """`orthogonalize` of matrices [N, rows, columns] that every process holds; each does its share of them."""
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if processes == 1:
        return orthogonalize(matrices)
    number, share = len(matrices), -(-len(matrices) // processes)
    padded = nn.functional.pad(matrices, (0, 0, 0, 0, 0, processes * share - number))
    together = torch.empty_like(padded)
    dist.all_gather_into_tensor(together, orthogonalize(padded.chunk(processes)[dist.get_rank()]))
    return together[:number]


def orthogonalize_rows(shards: Tensor, rows: int, group: Any) -> Tensor:
    """`orthogonalize` of N matrices of `rows` rows each, of which a process of `group` holds [N, its rows, columns].

    The rows of each matrix meet on one process, as many matrices on each, and what it finds goes back the same way.
    """
    processes, number, columns = group.size(), len(shards), shards.shape[2]
    share, chunk = -(-number // processes), -(-rows // processes)  # matrices and rows of a process; the last has fewer
    sent = nn.functional.pad(shards, (0, 0, 0, chunk - shards.shape[1], 0, processes * share - number))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    whole = received.view(processes, share, chunk, columns).transpose(0, 1).reshape(share, -1, columns)
    found = torch.zeros_like(whole)
    found[:, :rows] = orthogonalize(whole[:, :rows])
    sent = found.view(share, processes, chunk, columns).transpose(0, 1).contiguous()
    dist.all_to_all_single(received, sent.view_as(received), group=group)
    return received[:number, : shards.shape[1]]


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
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


def _polynomials(gram: Tensor, steps: int) -> Tensor:
    """The product of the polynomials that `steps` steps multiply X with, from X @ X.mT [N, rows, rows]."""
    a, b, c = NEWTON_SCHULZ
    product = torch.eye(gram.shape[-1], device=gram.device)
    for _ in range(steps):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
    return product
