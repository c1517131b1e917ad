"""Inspect a model's next-token probabilities and attention weights.

Shapes: T tokens of the text that fit into the context, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minigpt.generation.sampling import INCOMPLETE_CHARACTER, context_length, decode
from minigpt.modeling.loading import evaluating
from minigpt.utils.errors import UserError

VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"})


def next_token_probabilities(model: PreTrainedModel, ids: list[int], k: int) -> list[tuple[int, float]]:
    """The `k` most likely tokens after `ids` as pairs (id, probability), the most likely first.

    Only the last `ids` that fit into the context are used. The probabilities are those of the whole vocabulary, before
    temperature, top k and top p.
    """
    with evaluating(model), torch.no_grad():
        logits = model(_inputs(model, ids)).logits[0, -1]  # [V]
    best = logits.float().softmax(-1).topk(min(k, logits.numel()))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def attention_weights(model: PreTrainedModel, ids: list[int], layer: int, head: int) -> Tensor:
    """The weights [T, T] with which each token (row) attends to each token (column), on the CPU in float32.

    Each row sums to 1. `layer` and `head` count from 0. Raises UserError if the model has no such layer or head.
    """
    config = model.config
    for name, value, number in (
        ("layer", layer, config.num_hidden_layers),
        ("head", head, config.num_attention_heads),
    ):
        if not 0 <= value < number:
            raise UserError(f"{name}={value}: the model has {number}, counted from 0 to {number - 1}")
    with evaluating(model), eager_attention(model), torch.no_grad():
        output = model(_inputs(model, ids), output_attentions=True, use_cache=False)
    weights: Tensor = output.attentions[layer][0, head]
    return weights.float().cpu()


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Eager attention, the only kernel that returns its weights, inside the block; afterwards the previous kernel."""
    # assigned directly: before transformers 5.16, `set_attn_implementation` did not accept a MiniGPT
    previous = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = previous


def token_label(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as people can read it: white space is visible, a part of a character is shown by its bytes or its id."""
    text = decode(tokenizer, [token])
    if text and INCOMPLETE_CHARACTER not in text:
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text.translate(VISIBLE))
    return str(tokenizer.convert_ids_to_tokens(token) or f"<{token}>")


def _inputs(model: PreTrainedModel, ids: list[int]) -> Tensor:
    limit = context_length(model)
    return torch.tensor([ids if limit is None else ids[-limit:]], device=model.device)  # [1, T]
