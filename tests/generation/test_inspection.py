"""Laws of next-token probabilities and attention weights, each against plain torch."""

import pytest
import torch

from minigpt.generation.inspection import attention_weights, next_token_probabilities, token_label
from support.tiny import CONTEXT, byte_tokenizer, tiny_model

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def test_next_token_probabilities_are_the_largest_of_the_softmax_of_the_last_logits() -> None:
    model = tiny_model(embd_pdrop=0.5).train()
    model.transformer.layers[1].eval()
    best = next_token_probabilities(model, IDS, 10)
    assert model.training
    assert not model.transformer.layers[1].training
    with torch.no_grad():
        logits = model.eval()(torch.tensor([IDS])).logits[0, -1]
    probabilities = logits.exp() / logits.exp().sum()
    assert [token for token, _ in best] == probabilities.argsort(descending=True)[:10].tolist()
    largest = probabilities.sort(descending=True).values[:10].tolist()
    assert [probability for _, probability in best] == pytest.approx(largest)
    everything = next_token_probabilities(model, IDS, 1000)
    assert len(everything) == 257
    assert sum(probability for _, probability in everything) == pytest.approx(1)


def test_only_the_last_tokens_that_fit_into_the_context_are_used() -> None:
    model, ids = tiny_model(), [token % 257 for token in range(CONTEXT + 5)]
    assert next_token_probabilities(model, ids, 3) == next_token_probabilities(model, ids[5:], 3)
    assert attention_weights(model, ids, 0, 0).shape == (CONTEXT, CONTEXT)


@pytest.mark.parametrize(("layer", "head"), [(0, 0), (1, 1)])
def test_attention_weights_are_the_softmax_of_queries_times_keys(layer: int, head: int) -> None:
    model = tiny_model()
    kernel = model.config._attn_implementation
    weights = attention_weights(model, IDS, layer, head)
    assert model.config._attn_implementation == kernel != "eager"
    block = model.transformer.layers[layer]
    with torch.no_grad():
        hidden = model(torch.tensor([IDS]), output_hidden_states=True).hidden_states[layer][0]  # [T, C]
        normed = block.input_layernorm(hidden)
        size = block.self_attn.head_dim
        columns = slice(head * size, (head + 1) * size)
        query, key = block.self_attn.q_proj(normed)[:, columns], block.self_attn.k_proj(normed)[:, columns]
        scores = query @ key.T / size**0.5
        future = torch.ones_like(scores).triu(1).bool()
        expected = scores.masked_fill(future, float("-inf")).softmax(-1)
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("layer", "head", "message"), [(2, 0, "layer=2: the model has 2"), (0, -1, "head=-1")])
def test_a_missing_layer_or_head_is_named(layer: int, head: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_weights(tiny_model(), IDS, layer, head)


def test_every_token_has_a_visible_label_of_its_own() -> None:
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>")
    labels = [token_label(tokenizer, token) for token in range(257)]
    assert all(label.strip() for label in labels)
    assert len(set(labels)) == 257
    assert token_label(tokenizer, tokenizer(" ")["input_ids"][0]) == "␣"
    assert token_label(tokenizer, 300) == "<300>"  # an id that only rounds the vocabulary up
