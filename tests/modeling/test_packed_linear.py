"""Laws of packed weights: the same function, and models of other classes unchanged."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minigpt.modeling.packed_linear import PackedLinear, pack_linears
from support.tiny import tiny_model


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"tie_word_embeddings": False}])
def test_packed_model_has_the_same_logits_and_text(options: dict[str, bool]) -> None:
    plain = tiny_model(**options)
    packed = pack_linears(copy.deepcopy(plain))
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == 2 * 4 + 1
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, plain(ids).logits, atol=1e-5, rtol=0)
    texts = [model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0) for model in (plain, packed)]
    assert torch.equal(*texts)


def test_a_compiled_packed_model_computes_the_same() -> None:
    plain, packed = tiny_model(), pack_linears(tiny_model())
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")(ids).logits
        torch.testing.assert_close(compiled, plain(ids).logits, atol=1e-5, rtol=0)


def test_packed_bfloat16_is_as_close_to_float32_as_unpacked_bfloat16() -> None:
    reference, plain, packed = tiny_model(), tiny_model().bfloat16(), pack_linears(tiny_model().bfloat16())
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        errors = [(model(ids).logits.float() - reference(ids).logits).abs().max() for model in (plain, packed)]
    assert errors[1] <= 1.5 * errors[0]


def test_a_model_of_another_class_is_not_packed() -> None:
    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=16,
        vocab_size=20,
    )  # fmt: skip
    llama = pack_linears(LlamaForCausalLM(config))
    assert not any(isinstance(module, PackedLinear) for module in llama.modules())
