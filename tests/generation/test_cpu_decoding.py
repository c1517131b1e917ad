"""Laws of the decoding loop for CPUs: it gives the tokens of `generate`, for every way to choose them."""

import pytest
import torch

from minigpt.generation.cpu_decoding import decode, has_fast_decoding
from minigpt.generation.sampling import Sampling
from minigpt.generation.static_cache import use_static_cache
from minigpt.modeling.packed_linear import pack_linears
from support.tiny import tiny_model

SAMPLINGS = {
    "greedy": Sampling(20, temperature=0),
    "temperature": Sampling(20, temperature=1.3),
    "top k": Sampling(20, top_k=5),
    "top p": Sampling(20, temperature=0.7, top_p=0.8),
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": False, "qkv_bias": False}])
def test_the_tokens_are_those_of_generate(sampling: Sampling, packed: bool, dtype: torch.dtype, shape: dict) -> None:
    model = tiny_model(50, **shape).to(dtype)
    if packed:
        pack_linears(model)
    assert has_fast_decoding(model)
    for sequences in (1, 3):
        prompt = torch.randint(0, 50, (1, 8), generator=torch.Generator().manual_seed(sequences)).expand(sequences, 8)
        options = sampling.generate_options() | {
            "attention_mask": torch.ones_like(prompt),
            "max_new_tokens": sampling.max_new_tokens,
            "eos_token_id": [3, 7, 11],
            "pad_token_id": 0,
            "suppress_tokens": [48, 49],
        }
        torch.manual_seed(0)
        expected = model.generate(prompt, **options)
        torch.manual_seed(0)
        assert torch.equal(model.generate(prompt, custom_generate=decode, **options), expected)


def test_a_static_cache_and_other_devices_keep_the_loop_of_generate() -> None:
    model = tiny_model()
    use_static_cache(model)
    assert not has_fast_decoding(model)
    assert not has_fast_decoding(tiny_model().to("meta"))
