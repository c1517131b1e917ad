"""In-place cross-entropy: the gradient of the loss overwrites the logits.

The logits are often the largest tensor of a training step: 12 sequences of 1,024 tokens with GPT-2's vocabulary take
2.5 GB in float32. The usual cross-entropy also holds their float32 copy, the log-probabilities and the gradients of
both. But the gradient with respect to the logits is softmax(logits) - one_hot(target), which is known in the forward
pass already, and training does not need the logits after that. So `in_place_cross_entropy` writes the gradient into
the memory of the logits; the backward pass multiplies it by the incoming gradient.

On a CPU this is done for a chunk of rows at a time, so that the float32 copies stay small. A GPU would start about
twelve kernels per chunk; there, torch's compiler makes one or two kernels for all rows, without such copies.
"""

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.loss.loss_utils import ForCausalLMLoss

IGNORE_INDEX = -100  # labels with this value do not count in the loss
CHUNK_ELEMENTS = 1 << 22  # logits that are processed, and copied to float32, at a time


def in_place_cross_entropy(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | float | None = None,
    **kwargs: Any,
) -> Tensor:
    """Cross-entropy in nats, float32; a drop-in `loss_function` for the causal language models of transformers.

    Returns the sum of the losses over the targets `shift_labels` [B, T] (in kwargs; -100 is ignored), divided by
    `num_items_in_batch`. If `logits` [B, T, V] need a gradient, they are overwritten with it. So this loss must not be
    used if anything reads the logits afterwards (accuracy, distillation, a second loss), if the backward pass runs
    more than once, or for second derivatives. The trainer calls the model with `skip_logits=True`, so that nothing
    can read the logits.

    Falls back to the loss of transformers, which leaves the logits unchanged, if `shift_labels` or
    `num_items_in_batch` is missing, and while compiling: the compiler fuses that loss by itself.
    """
    targets = kwargs.get("shift_labels")
    if targets is None or num_items_in_batch is None or torch.compiler.is_compiling():
        options = {"num_items_in_batch": num_items_in_batch, **kwargs}
        return ForCausalLMLoss(logits, labels, vocab_size, **options)
    loss_sum: Tensor = _InPlaceLossSum.apply(logits.view(-1, vocab_size), targets.view(-1))
    return loss_sum / num_items_in_batch


class _InPlaceLossSum(torch.autograd.Function):
    """Sum of the losses of targets [N] that are not ignored, from logits [N, V]."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """The sum in float32. Afterwards `logits` hold their gradient if they need one."""
        gradient = logits.detach()  # shares the memory of the logits
        if logits.is_cuda and has_triton():
            loss_sum: Tensor = compiled_loss_sum()(gradient, targets, ctx.needs_input_grad[0])
        else:
            loss_sum = chunked_loss_sum(gradient, targets, ctx.needs_input_grad[0])
        ctx.gradient = gradient
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_sum_gradient: Tensor) -> tuple[Tensor, None]:
        # the caller may keep the loss, and with it ctx, for longer than the gradient is needed
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(loss_sum_gradient), None


def chunked_loss_sum(logits: Tensor, targets: Tensor, overwrite: bool) -> Tensor:
    """The sum of the losses; `overwrite` replaces the logits [N, V] by their gradient. For any device."""
    loss_sum = torch.zeros((), device=logits.device)
    chunk_rows = max(1, CHUNK_ELEMENTS // logits.shape[1])
    counted = (targets != IGNORE_INDEX).unsqueeze(1)  # [N, 1]
    columns = targets.clamp(min=0).unsqueeze(1)  # [N, 1]; an ignored target becomes a valid index
    chunks = zip(logits.split(chunk_rows), columns.split(chunk_rows), counted.split(chunk_rows), strict=True)
    for chunk, column, is_counted in chunks:
        log_probabilities = torch.log_softmax(chunk, dim=1, dtype=torch.float32)
        loss_sum -= log_probabilities.gather(1, column).masked_fill_(~is_counted, 0.0).sum()
        if overwrite:
            probabilities = log_probabilities.exp_()
            minus_one = probabilities.new_full((), -1.0).expand_as(column)
            chunk.copy_(probabilities.scatter_add_(1, column, minus_one)).mul_(is_counted)
    return loss_sum


def fused_loss_sum(logits: Tensor, targets: Tensor, overwrite: bool) -> Tensor:
    """The same in operations that torch's compiler fuses: reductions over the rows, then one pass that writes."""
    counted = (targets != IGNORE_INDEX).unsqueeze(1)
    columns = targets.clamp(min=0).unsqueeze(1)
    log_sums = torch.logsumexp(logits.float(), dim=1, keepdim=True)
    losses = torch.where(counted, log_sums - logits.gather(1, columns).float(), 0.0)
    if overwrite:
        is_target = torch.arange(logits.shape[1], device=logits.device) == columns
        logits.copy_(((logits.float() - log_sums).exp() - is_target.float()) * counted)
    return losses.sum()


@cache
def has_triton() -> bool:
    """Whether the compiler can make GPU kernels: PyTorch for Windows comes without Triton."""
    return importlib.util.find_spec("triton") is not None


@cache
def compiled_loss_sum() -> Any:
    """`fused_loss_sum`, compiled once for every number of rows."""
    return torch.compile(fused_loss_sum, dynamic=True)
