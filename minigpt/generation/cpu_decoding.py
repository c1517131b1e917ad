"""A decoding loop for a MiniGPT on a CPU, with keys and values in memory of fixed size.

`generate` spends several milliseconds per token outside the model: it prepares masks and inputs, and copies the cache
to append to it. This loop does the arithmetic of a token and nothing else. Processors and stopping criteria are those
that `generate` prepares, so the tokens are the same.

Shapes: B sequences, T tokens of the prompt, S positions in the cache, C hidden size, H heads, D head size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from modeling_minigpt import MiniGPTForCausalLM, MiniGPTLayer


def has_fast_decoding(model: PreTrainedModel) -> bool:
    """Whether `decode` can take the place of `generate`'s own loop: for a MiniGPT on a CPU without a static cache.

    The loop calls the layers without the model's `forward`, which accelerate replaces for mixed precision.
    """
    is_minigpt = isinstance(model, MiniGPTForCausalLM) and model.device.type == "cpu" and "forward" not in vars(model)
    return is_minigpt and model.generation_config.cache_implementation in (None, "dynamic")


@torch.inference_mode()
def decode(
    model: MiniGPTForCausalLM,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Tensor:
    """Token ids [B, T + new] of prompts [B, T] without padding: `custom_generate` for `model.generate`.

    Finished sequences are padded until the last one ends, as by `generate`.
    """
    max_length = generation_config.max_length
    assert max_length is not None
    prefill = model(input_ids, use_cache=True)
    caches = [LayerCache(layer.keys, layer.values, max_length) for layer in prefill.past_key_values.layers]
    logits = prefill.logits[:, -1]
    del prefill
    padding = generation_config.pad_token_id
    processed: Callable[[Tensor, Tensor], Tensor] = logits_processor  # type: ignore[assignment]  # declared LongTensor
    unfinished = torch.ones(len(input_ids), dtype=torch.bool)
    while True:
        scores: Tensor = processed(input_ids, logits.float())
        if generation_config.do_sample:
            next_ids = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
        else:
            next_ids = scores.argmax(-1)
        if not unfinished.all():
            next_ids = torch.where(unfinished, next_ids, padding)
        input_ids = torch.cat([input_ids, next_ids.unsqueeze(1)], dim=1)
        if streamer is not None:
            streamer.put(next_ids)
        unfinished = unfinished & ~stopping_criteria(input_ids, scores)
        if not unfinished.any():
            break
        logits = next_logits(model, next_ids, input_ids.shape[1] - 1, caches)
    if streamer is not None:
        streamer.end()
    return input_ids


class LayerCache:
    """Keys and values [B, H, S, D] of one layer, with room for `length` positions."""

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        batch, heads, filled, head_dim = keys.shape
        self.keys, self.values = keys.new_empty(2, batch, heads, length, head_dim).unbind()
        self.keys[:, :, :filled], self.values[:, :, :filled] = keys, values


def next_logits(model: MiniGPTForCausalLM, ids: Tensor, position: int, caches: list[LayerCache]) -> Tensor:
    """Logits [B, V] after the tokens `ids` [B], which are at `position`; their keys and values enter the caches."""
    transformer = model.transformer
    hidden_states = transformer.embed_tokens.weight[ids] + transformer.embed_positions.weight[position]  # [B, C]
    for layer, cache in zip(transformer.layers, caches, strict=True):
        assert isinstance(layer, MiniGPTLayer)
        hidden_states = _layer(layer, hidden_states, position, cache)
    logits: Tensor = model.lm_head(transformer.norm(hidden_states))
    return logits


def _layer(layer: MiniGPTLayer, hidden_states: Tensor, position: int, cache: LayerCache) -> Tensor:
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden_states)
    per_head = (len(normed), -1, 1, attention.head_dim)  # [B, H, 1, D]
    query, key, value = (states.view(per_head) for states in attention.project_qkv(normed))
    cache.keys[:, :, position : position + 1] = key
    cache.values[:, :, position : position + 1] = value
    mixed = nn.functional.scaled_dot_product_attention(
        query,
        cache.keys[:, :, : position + 1],
        cache.values[:, :, : position + 1],
        scale=attention.scaling,
    )
    hidden_states = hidden_states + attention.o_proj(mixed.view(normed.shape))
    mlp = layer.mlp
    return hidden_states + mlp.down_proj(mlp.act_fn(mlp.up_proj(layer.post_attention_layernorm(hidden_states))))
