"""Cross-entropy computed in place: the gradient takes the place of the logits.

Cross-entropy as transformers takes it holds logits, their float32 copy, log-probabilities and the gradients of both:
at GPT-2's vocabulary more memory than the rest of the step. Here nothing but the logits is of that size, and no
product is computed twice.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers.loss.loss_utils import ForCausalLMLoss

CHUNK_NUMBERS = 1 << 22  # logits in float32 at a time


def in_place_cross_entropy(
    logits: Tensor, labels: Tensor | None, vocab_size: int, num_items_in_batch: Any = None, **kwargs: Any
) -> Tensor:
    """The loss of transformers' causal models, nats, in float32; `shift_labels` in kwargs are the targets.

    Where a gradient is wanted the logits [B, T, V] are overwritten with it: whoever uses this must not read them, as
    a model called with `skip_logits=True` does not. A compiler makes one kernel of the usual loss, so it gets that.
    """
    targets = kwargs.get("shift_labels")
    if targets is None or num_items_in_batch is None or torch.compiler.is_compiling():
        options = {"num_items_in_batch": num_items_in_batch, **kwargs}
        return ForCausalLMLoss(logits, labels, vocab_size, **options)
    summed: Tensor = _SummedLoss.apply(logits.view(-1, vocab_size), targets.view(-1))
    return summed / num_items_in_batch


class _SummedLoss(torch.autograd.Function):
    """Logits [N, V] and targets [N] to the sum of the losses of all targets that are not ignored."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, targets: Tensor) -> Tensor:
        """The sum in float32; where a gradient is wanted, `logits` hold it afterwards."""
        gradient = logits.detach()  # the same memory
        total = torch.zeros((), device=logits.device)
        rows = max(1, CHUNK_NUMBERS // logits.shape[1])
        counted = (targets != IGNORE_INDEX).unsqueeze(1)  # [N, 1]
        columns = targets.clamp(min=0).unsqueeze(1)
        for chunk, column, counts in zip(gradient.split(rows), columns.split(rows), counted.split(rows), strict=True):
            probabilities = torch.log_softmax(chunk, dim=1, dtype=torch.float32)
            total -= probabilities.gather(1, column).masked_fill_(~counts, 0.0).sum()
            if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
                probabilities.exp_().scatter_add_(1, column, probabilities.new_full((), -1.0).expand_as(column))
                chunk.copy_(probabilities).mul_(counts)
        ctx.gradient = gradient  # type: ignore[attr-defined]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor) -> tuple[Tensor, None]:
        gradient, ctx.gradient = ctx.gradient, None  # the loss may be held longer than its gradient is needed
        return gradient.mul_(of_total), None


IGNORE_INDEX = -100  # the label that has no loss
