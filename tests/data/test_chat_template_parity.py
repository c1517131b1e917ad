"""Laws of the loss mask of conversations: ids and mask are those of transformers' `return_assistant_tokens_mask`."""

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from minigpt.data.chat import Example, LossMasking, encode_examples
from minigpt.data.encoding import Encoder, EncoderSpec
from minigpt.data.shards import ENDS_DOCUMENT, IN_LOSS
from support.conversations import chat_templates, chat_tokenizers, random_conversations

CONVERSATIONS = random_conversations(40)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return chat_tokenizers()


@pytest.mark.parametrize("template", ["chatml", "plain", "llama"])
@pytest.mark.parametrize("name", ["gpt2", "gpt2 with ChatML", "llama 3", "llama 2"])
def test_ids_and_loss_mask_of_a_conversation_are_those_of_transformers(
    tokenizers: dict[str, PreTrainedTokenizerFast], name: str, template: str
) -> None:
    tokenizer = tokenizers[name]
    tokenizer.chat_template = chat_templates()[template]
    loss_masking = LossMasking.from_tokenizer(tokenizer, completion_only=True)
    encoder = Encoder(EncoderSpec.from_tokenizer(tokenizer, np.dtype("uint16"), large=False))
    for messages in CONVERSATIONS:
        expected = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        example = Example([], messages, where="rows.jsonl:1")
        ids, marks, _ = encode_examples([example], loss_masking, encoder, tokenizer.eos_token_id)
        length = len(expected["input_ids"])
        assert ids[:length].tolist() == expected["input_ids"], messages
        assert (marks[:length] & IN_LOSS).tolist() == expected["assistant_masks"], messages
        assert 0 < sum(expected["assistant_masks"]) < length
        # what follows is the end of the document, unless the template has written it
        is_written = expected["input_ids"][-1] == tokenizer.eos_token_id
        assert ids[length:].tolist() == ([] if is_written else [tokenizer.eos_token_id])
        assert np.flatnonzero(marks & ENDS_DOCUMENT).tolist() == [len(ids) - 1]
