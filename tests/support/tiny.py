"""Small tokenizers and a tiny model with random weights."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from configuration_minigpt import MiniGPTConfig
from modeling_minigpt import MiniGPTForCausalLM

CONTEXT = 32


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token per byte and an end-of-text token, so that every text can be encoded."""
    vocabulary = {"<|endoftext|>": 0}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def letter_tokenizer(letters: str) -> PreTrainedTokenizerFast:
    """One token per letter and no special tokens, so that texts never end and tokens are characters."""
    core = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(letters)}))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def tiny_model(vocab_size: int = 257, **config: object) -> MiniGPTForCausalLM:
    """Two layers and two heads with a context of `CONTEXT` tokens; the weights are always the same."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": CONTEXT}
    options = shape | {"vocab_size": vocab_size, "initializer_range": 0.2} | config
    return MiniGPTForCausalLM(MiniGPTConfig(**options)).eval()
