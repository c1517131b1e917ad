"""Activation checkpointing: which activations are kept for the backward pass, and which are computed again.

full: a layer keeps its input alone, and is computed a second time. selective: it keeps what its matrix products and
attention made, and only what is cheap (norms, conversions, activation function, residual sums) is computed again, as
in Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198).
"""

from functools import partial

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel

aten = torch.ops.aten

PRODUCTS = [aten.mm.default, aten.addmm.default]

ATTENTION = [  # the kernels of scaled_dot_product_attention; others are computed again
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
]


def enable_activation_checkpointing(model: PreTrainedModel, how: str) -> None:
    """Have the layers of `model` keep less for the backward pass; `how` is no, selective or full."""
    if how == "no":
        return
    options: dict[str, object] = {"use_reentrant": False}
    if how == "selective":
        # a kernel that draws its own dropout is run again: left out, the draws after it would be others than before
        kept = PRODUCTS if model.config.attn_pdrop else PRODUCTS + ATTENTION
        options["context_fn"] = partial(create_selective_checkpoint_contexts, kept)
    # the newer of its two names: where that is there, the other one warns
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
