"""Initial weights that suit the width of a model."""

import math

import torch
from torch import nn

INPUT_MATRICES = ("q_proj", "k_proj", "v_proj", "up_proj")  # they read the normalized hidden states of a layer


@torch.no_grad()
def scale_input_matrices(model: nn.Module, gain: float, initializer_range: float) -> None:
    """Scale the new q, k, v and up projections of every layer to a standard deviation of gain / sqrt(fan_in).

    GPT-2's 0.02 is a gain of 0.55 at the width of GPT-2 124M, and less in a narrower model, whose layers then start
    with small outputs. `initializer_range` is the standard deviation that the weights have now.
    Source: the rule of Yang et al. 2022 (https://arxiv.org/abs/2203.03466) for matrices between two hidden layers.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(INPUT_MATRICES):
            module.weight *= gain / (initializer_range * math.sqrt(module.in_features))
