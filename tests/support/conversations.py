"""Random conversations that are hard to encode, and tokenizers and chat templates of several families."""

import random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from minigpt.data.chat import Messages
from minigpt.data.chat_template import read_chat_template
from minigpt.data.tokenizer import train_bpe

PIECES = [
    *("hello", " world", "Assistant:", "User:\n", "\nAssistant:\n", "I'll", "don't", "42", "3.14", " a", "?!"),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u200b", "\u2028"),  # the last three: odd white space
    *(
        "ü",
        "u\u0308",
        "ﬁ",
        "中文",
        "שלום",
        "\U0001f600",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "\U0001f1e9\U0001f1ea",
    ),
    *("<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "<|eot_id|>", "<|im_", "|>", "</s>", "▁"),
    *("{% generation %}", "{{ content }}", "</", "\\n"),
]
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]
LLAMA_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|endoftext|>"]
LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endgeneration %}{%- else %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)


def random_text(random: random.Random) -> str:
    """A text of up to ten of the pieces, not all of them white space."""
    while not (text := "".join(random.choices(PIECES, k=random.randint(1, 10)))).strip():
        pass
    return text


def random_conversations(number: int, seed: int = 0) -> list[Messages]:
    """Conversations of one to six questions with their answers; about half begin with a system message."""
    source = random.Random(seed)
    conversations = []
    for _ in range(number):
        roles = ["system"] * source.randint(0, 1) + ["user", "assistant"] * source.randint(1, 6)
        conversations.append([{"role": role, "content": random_text(source)} for role in roles])
    return conversations


def chat_templates() -> dict[str, str]:
    return {"chatml": read_chat_template("chatml"), "plain": read_chat_template("plain"), "llama": LLAMA_TEMPLATE}


def chat_tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """Tokenizers without a template: GPT-2's kind, the same with ChatML's tokens, Llama 3's, Llama 2's."""
    texts = [message["content"] for messages in random_conversations(200, seed=1) for message in messages]
    return {
        "gpt2": train_bpe(texts, 400),
        "gpt2 with ChatML": train_bpe(texts, 400, CHATML_TOKENS),
        "llama 3": _llama3(texts),
        "llama 2": _llama2(texts),
    }


def _llama3(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a pattern of its own, which writes a beginning-of-text id before a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(texts, trainer)
    core.add_special_tokens(LLAMA_TOKENS)
    begin = LLAMA_TOKENS[0]
    core.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, core.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=begin, eos_token="<|endoftext|>")


def _llama2(texts: list[str]) -> PreTrainedTokenizerFast:
    """A BPE with byte fallback that writes spaces as ▁, also before the first word."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
