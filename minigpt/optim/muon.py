"""Muon: momentum with orthogonalized updates, for the weight matrices of the layers.

For a gradient G, Muon keeps the momentum M = μM + (1 - μ)G, looks ahead as in Nesterov's method, (1 - μ)G + μM, and
replaces the singular values of that matrix by values near 1. So the update is about equally large in every direction,
however small the gradient is in it. The Newton-Schulz iteration does this with matrix products only, without a
singular value decomposition.
Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. `torch.optim.Muon` computes the same, one matrix
at a time; here matrices of one shape are processed together, and several processes share the work.

Shapes: N matrices of one shape [rows, columns]; P processes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# a, b, c of the polynomial aX + b(XXᵀ)X + c(XXᵀ)²X of each Newton-Schulz step; later steps repeat the last. Each
# brings singular values that may be as small as 0.001 as near to 1 as a polynomial of this degree can, given the steps
# before it. Source: Polar Express, Amsel et al. 2025, https://arxiv.org/abs/2505.16932
NEWTON_SCHULZ_COEFFICIENTS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]
SAFETY_FACTOR = 1.01  # of the norm, so that rounding takes no singular value above 1, where the polynomials explode


class Muon(torch.optim.AdamW):
    """Muon for the parameter groups with `"muon": True`, whose parameters are matrices; AdamW for all other groups.

    - momentum: μ, the share of the old momentum that is kept in each step.
    - ns_steps: Newton-Schulz steps. More bring smaller singular values to 1, and take longer.
    - defaults: the options of AdamW. `lr` and `weight_decay` of a Muon group are those of Muon; the weight decay is
      decoupled, as in AdamW.

    A matrix of a Muon group with `"row_blocks": R` is taken as R matrices, one below the other, as are the heads of a
    query or key projection. They are orthogonalized separately, which is also cheaper.

    With P processes each orthogonalizes 1/P of the matrices, whether every process has all of them (data parallel) or
    only some rows of each (FSDP2). So all processes must take every step together.

    As in AdamW's fused kernel, a step while the attribute `found_inf` is a tensor with 1 changes nothing, and the host
    does not wait to read it.
    """

    param_groups: list[dict[str, Any]]

    def __init__(self, params: Iterable[dict[str, Any]], momentum: float, ns_steps: int = 5, **defaults: Any) -> None:
        super().__init__(params, **defaults)
        self.momentum, self.ns_steps = momentum, ns_steps
        for group in self.param_groups:
            group.setdefault("muon", False)
            group.setdefault("row_blocks", 1)
        # AdamW's fused kernel can divide the gradients by float16's loss scale itself; Muon cannot, so GradScaler must
        self._step_supports_amp_scaling = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        # AdamW's method expects a step count in the state of every parameter, which Muon's matrices do not have
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update all parameters that have a gradient. Returns the loss of `closure`, None without one."""
        all_groups = self.param_groups
        try:
            self.param_groups = [group for group in all_groups if not group["muon"]]
            loss = super().step(closure)
        finally:
            self.param_groups = all_groups
        for group in all_groups:
            if group["muon"]:
                self._muon_step(group)
        return loss

    def _muon_step(self, group: dict[str, Any]) -> None:
        found_inf = getattr(self, "found_inf", None)
        orthogonalized = partial(orthogonalize, steps=self.ns_steps, row_blocks=group["row_blocks"])
        parameters_of_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameters_of_shape[parameter.shape].append(parameter)
        for (rows, columns), parameters in parameters_of_shape.items():
            momenta = [_local(self._momentum(parameter)) for parameter in parameters]
            gradients = [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
            if found_inf is not None:  # a gradient equal to the momentum leaves the momentum unchanged
                pairs = zip(gradients, momenta, strict=True)
                gradients = [torch.where(found_inf > 0, momentum, gradient) for gradient, momentum in pairs]
            torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
            looked_ahead = torch.stack(torch._foreach_lerp(gradients, momenta, self.momentum))
            if isinstance(parameters[0], DTensor):
                updates = orthogonalize_rows(looked_ahead, rows, _sharding_group(parameters[0]), orthogonalized)
            else:
                updates = orthogonalize_copies(looked_ahead, orthogonalized)
            weights = [_local(parameter) for parameter in parameters]
            decay = 1 - group["lr"] * group["weight_decay"]
            if found_inf is None:
                torch._foreach_mul_(weights, decay)
            else:
                torch._foreach_mul_(weights, torch.where(found_inf > 0, 1.0, decay))
                updates = updates * (found_inf == 0)
            # the root mean square of a semi-orthogonal matrix is 1 / sqrt(max(rows, columns)); scaled by this factor
            # it is 1 / sqrt(columns) for every shape
            scale = max(1.0, rows / group["row_blocks"] / columns) ** 0.5
            torch._foreach_add_(weights, list(updates.unbind()), alpha=-group["lr"] * scale)

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"]
        return momentum


def _local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds (all of it if it is not sharded), in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sharding_group(parameter: DTensor) -> dist.ProcessGroup:
    """The processes that hold the rows of `parameter`, each a part of them."""
    (mesh_dimension,) = (number for number, placement in enumerate(parameter.placements) if placement.is_shard(0))
    return parameter.device_mesh.get_group(mesh_dimension)


def orthogonalize_copies(matrices: Tensor, orthogonalized: Callable[[Tensor], Tensor]) -> Tensor:
    """`orthogonalized` for matrices [N, rows, columns] that every process has; each process computes 1/P of them."""
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if processes == 1:
        return orthogonalized(matrices)
    number = len(matrices)
    share = -(-number // processes)  # matrices per process, rounded up
    padded = nn.functional.pad(matrices, (0, 0, 0, 0, 0, processes * share - number))
    gathered = torch.empty_like(padded)
    dist.all_gather_into_tensor(gathered, orthogonalized(padded.chunk(processes)[dist.get_rank()]))
    return gathered[:number]


def orthogonalize_rows(
    shards: Tensor, rows: int, group: dist.ProcessGroup, orthogonalized: Callable[[Tensor], Tensor]
) -> Tensor:
    """`orthogonalized` for N matrices of `rows` rows; each process has some rows of each matrix.

    Two all-to-all exchanges: the first gives each process of `group` all rows of its share of the matrices, the second
    returns the rows of the results to the processes that hold them. shards and result: [N, its rows, columns].
    """
    processes, number, columns = group.size(), len(shards), shards.shape[2]
    # matrices and rows per process, rounded up; the last processes may have fewer or none
    share, chunk = -(-number // processes), -(-rows // processes)
    # [P * share, chunk, columns]: this process's rows of all matrices, padded so that all processes send equally much
    outgoing = nn.functional.pad(shards, (0, 0, 0, chunk - shards.shape[1], 0, processes * share - number))
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, group=group)
    by_sender = incoming.view(processes, share, chunk, columns)
    whole = by_sender.transpose(0, 1).reshape(share, -1, columns)  # [share, P * chunk, columns]
    results = torch.zeros_like(whole)
    results[:, :rows] = orthogonalized(whole[:, :rows])
    outgoing = results.view(share, processes, chunk, columns).transpose(0, 1).contiguous()
    dist.all_to_all_single(incoming, outgoing.view_as(incoming), group=group)
    return incoming[:number, : shards.shape[1]]


def orthogonalize(matrices: Tensor, steps: int = 5, row_blocks: int = 1) -> Tensor:
    """Approximately semi-orthogonal matrices with the singular vectors of `matrices` [N, rows, columns].

    With `row_blocks` the rows of each matrix are divided into so many matrices, which are orthogonalized separately.

    Runs `steps` Newton-Schulz steps. Singular values that were at least 0.3 % of the Frobenius norm are then between
    0.87 and 1.13 (5 steps), 0.44 and 1.56 (4) or 0.18 and 1.87 (3). A matrix of zeros stays zero. In bfloat16 on CUDA,
    in float32 elsewhere; the result has the dtype of `matrices`.
    """
    last = len(NEWTON_SCHULZ_COEFFICIENTS) - 1
    coefficients = [NEWTON_SCHULZ_COEFFICIENTS[min(step, last)] for step in range(steps)]
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    x = x.unflatten(1, (row_blocks, -1)).flatten(0, 1)
    is_wide = x.shape[-2] <= x.shape[-1]
    if not is_wide:
        x = x.mT  # then X @ X.mT is the smaller of the two Gram matrices
    # the polynomials need singular values of at most 1
    x = x / (SAFETY_FACTOR * torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    if x.dtype == torch.float32 and x.shape[-2] < x.shape[-1]:
        # fewer operations: iterate on the small Gram matrix, then multiply X once. In bfloat16 the rounding errors of
        # this are several times larger.
        x = _newton_schulz_product(x @ x.mT, coefficients) @ x
    else:
        for a, b, c in coefficients:
            gram = x @ x.mT
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x if is_wide else x.mT).to(matrices.dtype).reshape(matrices.shape)


def _newton_schulz_product(gram: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """The matrix [N, rows, rows] that Newton-Schulz steps multiply X by, from the Gram matrix X @ X.mT.

    A step multiplies X by the polynomial aI + bG + cG² of its Gram matrix G, and the next Gram matrix follows from G
    and the polynomial alone.
    """
    product = polynomial = _polynomial(gram, *coefficients[0])
    for next_coefficients in coefficients[1:]:
        gram = polynomial @ gram @ polynomial
        polynomial = _polynomial(gram, *next_coefficients)
        product = polynomial @ product
    return product


def _polynomial(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """aI + bG + cG² for Gram matrices [N, rows, rows]."""
    polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
    return polynomial
