"""A tokenizer of bytes and a tiny model with random weights."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from configuration_minigpt import MiniGPTConfig
from modeling_minigpt import MiniGPTForCausalLM

CONTEXT = 32


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token a byte and an end-of-text token: every text is its own test case."""
    vocabulary = {"<|endoftext|>": 0}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def tiny_model(vocab_size: int = 257, **config: object) -> MiniGPTForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": CONTEXT}
    model = MiniGPTForCausalLM(MiniGPTConfig(vocab_size=vocab_size, initializer_range=0.2, **shape, **config))
    return model.eval()
