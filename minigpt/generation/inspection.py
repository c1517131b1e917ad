"""Inspect a model's next-token probabilities and attention weights.

Shapes: T tokens of the text that the model can see, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from minigpt.generation.sampling import context_length
from minigpt.modeling.loading import evaluating
from minigpt.utils.errors import UserError

VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"})


def next_token_probabilities(model: Any, ids: list[int], k: int) -> list[tuple[int, float]]:
    """The `k` likeliest tokens after `ids` (of which the model sees the last ones), as (id, probability), falling.

    The probabilities are the model's own, over the whole vocabulary, before temperature, top k and top p.
    """
    import torch

    with evaluating(model), torch.no_grad():
        logits = model(_tensor(model, ids)).logits[0, -1]  # [V]
    best = logits.float().softmax(-1).topk(min(k, logits.numel()))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def attention_weights(model: Any, ids: list[int], layer: int, head: int) -> Any:
    """The weights [T, T] with which each token (row) looks at each (column), on the CPU in float32; rows sum to 1.

    `layer` and `head` count from 0. Raises UserError where there is no such layer or head.
    """
    import torch

    config = model.config
    for name, value, number in (
        ("layer", layer, config.num_hidden_layers),
        ("head", head, config.num_attention_heads),
    ):
        if not 0 <= value < number:
            raise UserError(f"{name}={value}: the model has {number}, counted from 0 to {number - 1}")
    with evaluating(model), eager(model), torch.no_grad():
        output = model(_tensor(model, ids), output_attentions=True, use_cache=False)
    return output.attentions[layer][0, head].float().cpu()


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """Attention in plain operations, the only kernel that hands out its weights; afterwards the one before."""
    before = model.config._attn_implementation  # set by hand: before 5.16 `set_attn_implementation` knows no MiniGPT
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def token_label(tokenizer: Any, token: int) -> str:
    """A token for people: white space is visible, a part of a character is shown by its bytes or its id."""
    text = tokenizer.decode([token])
    if text and "\N{REPLACEMENT CHARACTER}" not in text:
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text.translate(VISIBLE))
    return str(tokenizer.convert_ids_to_tokens(token) or f"<{token}>")


def _tensor(model: Any, ids: list[int]) -> Any:
    import torch

    limit = context_length(model)
    return torch.tensor([ids if limit is None else ids[-limit:]], device=model.device)  # [1, T]
