"""Activation checkpointing: keep fewer activations for the backward pass and recompute the rest.

full: each layer keeps only its input, and its whole forward pass is computed twice.
selective: each layer keeps the outputs of its matrix products and of attention, and only cheap operations (norms,
casts, the activation function, residual sums) are recomputed.
Source: Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198), who compare the two.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel

aten = torch.ops.aten

MATRIX_PRODUCTS = [aten.mm.default, aten.addmm.default]

# the kernels of scaled_dot_product_attention; the output of any other attention is recomputed
ATTENTION_KERNELS = [
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
]


def enable_activation_checkpointing(model: PreTrainedModel, mode: Literal["no", "selective", "full"]) -> None:
    """Switch on activation checkpointing for the layers of `model`, with non-reentrant checkpoints.

    Losses and gradients stay bit-identical, dropout included.
    """
    if mode == "no":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        # A kernel with dropout must be recomputed: if its output were kept, it would draw no random numbers in the
        # recomputation, and the dropout after it would draw different ones than in the forward pass.
        kept_operations = MATRIX_PRODUCTS if model.config.attn_pdrop else MATRIX_PRODUCTS + ATTENTION_KERNELS
        options["context_fn"] = partial(create_selective_checkpoint_contexts, kept_operations)
    # transformers renamed the method; where both names exist, the old one warns
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
