"""Floating-point operations of a training step."""

from typing import Any


def train_flops_per_token(parameters: int, config: Any, block_size: int) -> float:
    """FLOPs of forward and backward for one token, attention over the whole block counted.

    Looking a position up is no arithmetic, so its table does not count; the token embedding does, as the output head.
    Source: Chowdhery et al. 2022 (arXiv:2204.02311), appendix B.
    """
    multiplied = parameters - config.max_position_embeddings * config.hidden_size
    if not config.tie_word_embeddings:
        multiplied -= config.vocab_size * config.hidden_size
    return 6 * multiplied + 12 * config.num_hidden_layers * config.hidden_size * block_size
