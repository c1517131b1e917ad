"""Build the attention mask of packed documents without making the host wait for the device.

transformers builds the same mask inside the model from `position_ids`, but first reads back from the device, in every
forward pass, whether any row holds several documents. Here that is known.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
)


def document_mask(position_ids: Tensor, config: PreTrainedConfig) -> Tensor | BlockMask | None:
    """The mask of causal attention inside each document of a row.

    position_ids, int [B, T], restart where a document starts. Returns what the attention kernel of `config` takes:
    [B, 1, T, T], bool for sdpa, or float32 to be added to the scores for eager; a BlockMask for flex_attention; None
    for FlashAttention, which reads position_ids itself.
    """
    batch, length = position_ids.shape
    first = position_ids[:, :1] - 1
    documents = (torch.diff(position_ids, prepend=first, dim=-1) != 1).cumsum(-1)  # [B, T]: 0, 0, 1, 1, 1, 2
    mask: Tensor | BlockMask | None = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
        batch_size=batch,
        q_length=length,
        kv_length=length,
        q_offset=0,
        kv_offset=0,
        mask_function=and_masks(causal_mask_function, packed_sequence_mask_function(documents)),
        attention_mask=None,
        allow_is_causal_skip=False,
        dtype=torch.float32,
        config=config,
        use_vmap=False,
        device=position_ids.device,
    )
    return mask
