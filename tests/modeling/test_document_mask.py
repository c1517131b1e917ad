"""Laws of the mask of packed documents: it is the one that transformers builds, for every attention kernel."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import create_causal_mask

from configuration_minigpt import MiniGPTConfig
from minigpt.modeling.document_mask import document_mask


def dense(mask: torch.Tensor | BlockMask | None) -> torch.Tensor:
    assert mask is not None
    return mask if isinstance(mask, torch.Tensor) else mask.to_dense()


FLEX = pytest.param("flex_attention", marks=pytest.mark.slow)  # its mask is compiled


@pytest.mark.parametrize("kernel", ["sdpa", "eager", FLEX])
def test_the_mask_is_that_of_transformers(kernel: str) -> None:
    config = MiniGPTConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    config._attn_implementation = kernel
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]])
    expected = create_causal_mask(config, torch.zeros(2, 8, 8), None, None, position_ids=position_ids)
    assert torch.equal(dense(document_mask(position_ids, config)), dense(expected))
