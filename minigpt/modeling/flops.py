"""Number of floating-point operations (FLOPs) of a training step."""

from configuration_minigpt import MiniGPTConfig


def train_flops_per_token(
    parameters: int, config: MiniGPTConfig, block_size: int, trained: int | None = None
) -> float:
    """FLOPs of the forward and backward pass for one token, with attention over the whole block.

    `parameters` is the number of all parameters, `trained` of those that are not frozen (None: all). Of a frozen
    matrix no gradient is computed, which is a third of its FLOPs. Embedding look-ups are not arithmetic, so the
    position table is subtracted, and so is the token embedding unless it is also the output head.
    Source: Chowdhery et al. 2022 (https://arxiv.org/abs/2204.02311), appendix B.
    """
    multiplied_parameters = parameters - config.max_position_embeddings * config.hidden_size
    if not config.tie_word_embeddings:
        multiplied_parameters -= config.vocab_size * config.hidden_size
    gradients = multiplied_parameters if trained is None else min(trained, multiplied_parameters)
    return 4 * multiplied_parameters + 2 * gradients + 12 * config.num_hidden_layers * config.hidden_size * block_size
