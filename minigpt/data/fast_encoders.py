r"""Encode faster than `tokenizers`, with the same ids.

`fast_encoder` is the only entry point. It returns None for a tokenizer that no fast encoder reproduces exactly.

Vocabularies of characters are a table lookup in numpy. Byte-level BPE with GPT-2's pattern is encoded by tiktoken, if
that is installed. tiktoken has no list of merges, only tokens and their ranks, so three conditions are checked first:

* Every merge makes a different token, so the rank of a token identifies its merge.
* `tokenizers` encodes the text of every token as that one token. It follows that two neighbors which together form a
  known token can only have been joined by that token's own merge; otherwise the text of the token alone would be
  encoded differently.
* Both libraries agree on which characters are letters, numbers and white space. Their Unicode versions may differ.

tiktoken spends most of its time on the look-ahead `\s+(?!\S)` in GPT-2's pattern, which leaves the last of several
spaces to the word after them. This module inserts U+10FFFF before that last space instead. The character is reserved
for such uses and does not occur in text. A pattern without look-ahead, which a faster automaton can match, skips it.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

Encode = Callable[[str], np.ndarray | None]  # text -> ids, or None for a text that must go through `tokenizers`

LONGEST = 2_000_000  # characters; `tokenizers` encodes longer texts, on which tiktoken may be very slow
MARK = "\U0010ffff"
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}\x{10FFFF}]+|\s+"
SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space
LAST_OF_SPACES = re.compile(f"(?<=[{SPACES}])(?=[{SPACES}][^{SPACES}])")

UNSUPPORTED_BPE_OPTIONS = (
    "dropout",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "byte_fallback",
    "ignore_merges",
)


class FastEncoder(ABC):
    """Plain data, small enough to be sent to a worker process, which calls `encoder()` itself."""

    library: ClassVar[str]  # that does the encoding
    by_character: ClassVar[bool]  # whether every character is one token

    @abstractmethod
    def encoder(self) -> Encode:
        """The function that encodes a text into an int64 array of ids."""


@dataclass(frozen=True)
class FastBPE(FastEncoder):
    """Byte-level BPE by tiktoken: the rank of every token's bytes, and the id of every rank."""

    ranks: dict[bytes, int]
    ids: np.ndarray

    library = "tiktoken"
    by_character = False

    def encoder(self) -> Encode:
        import tiktoken

        encoding = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=self.ranks, special_tokens={})

        def encode(text: str) -> np.ndarray | None:
            if len(text) > LONGEST or MARK in text:
                return None
            return self.ids[np.array(encoding.encode_ordinary(LAST_OF_SPACES.sub(MARK, text)), dtype=np.intp)]

        return encode


@dataclass(frozen=True)
class FastCharacters(FastEncoder):
    """A vocabulary of characters: the id of every code point, -1 if it has none.

    The last entry is -1; every code point above the table uses it.
    """

    ids: np.ndarray

    library = "numpy"
    by_character = True

    def encoder(self) -> Encode:
        def encode(text: str) -> np.ndarray | None:
            points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
            ids = self.ids[np.minimum(points, len(self.ids) - 1)]
            return None if len(ids) and ids.min() < 0 else ids

        return encode


def fast_encoder(tokenizer_json: str, large: bool = True) -> FastEncoder | None:
    """An encoder with the same ids as the tokenizer in `tokenizer_json` (a tokenizer.json), or None if there is none.

    The checks of a byte-level BPE take about a second, which pays off only for much text. With `large=False` they are
    not made, and the result for such a tokenizer is None.
    """
    state = json.loads(tokenizer_json)
    return _fast_characters(state) or (_fast_bpe(state) if large else None)


def _fast_bpe(state: dict[str, Any]) -> FastBPE | None:
    """For byte-level BPE; None if tiktoken is missing or might give other ids."""
    try:
        import tiktoken  # noqa: F401
    except ImportError:
        return None
    model = state["model"]
    if not _is_gpt2_like(state) or any(model.get(name) for name in UNSUPPORTED_BPE_OPTIONS):
        return None
    byte_of = {character: bytes([byte]) for byte, character in _byte_characters().items()}
    vocabulary = model["vocab"]
    if not set(byte_of) <= set(vocabulary):
        return None
    tokens = sorted(byte_of)
    ranks = {byte_of[token]: rank for rank, token in enumerate(tokens)}
    for merge in model["merges"]:
        token = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        tokens.append(token)
        ranks[b"".join(byte_of[character] for character in token)] = len(ranks)
    if len(ranks) != len(tokens) or not _each_token_is_its_own_encoding(state, tokens) or not _same_characters():
        return None
    return FastBPE(ranks, np.array([vocabulary[token] for token in tokens], dtype=np.int64))


def _fast_characters(state: dict[str, Any]) -> FastCharacters | None:
    """For a vocabulary of characters; None if the tokenizer is something else."""
    vocabulary = state["model"].get("vocab")
    splits = (state["pre_tokenizer"] or {}).get("pattern") == {"Regex": r"[\s\S]"}
    if state["model"]["type"] != "WordLevel" or not splits or not _encodes_text_unchanged(state):
        return None
    if state["model"].get("unk_token") in vocabulary:
        return None
    id_of_point = {ord(token): index for token, index in vocabulary.items() if len(token) == 1}
    ids = np.full(max(id_of_point) + 2, -1, dtype=np.int64)
    ids[list(id_of_point)] = list(id_of_point.values())
    return FastCharacters(ids)


def _is_gpt2_like(state: dict[str, Any]) -> bool:
    pre_tokenizer = state["pre_tokenizer"] or {}
    return (
        state["model"]["type"] == "BPE"
        and _encodes_text_unchanged(state)
        and pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer["use_regex"]
        and not pre_tokenizer["add_prefix_space"]
    )


def _encodes_text_unchanged(state: dict[str, Any]) -> bool:
    """Whether text is not normalized first and ordinary text is not searched for added tokens."""
    return state["normalizer"] is None and all(token["special"] for token in state["added_tokens"])


def _byte_characters() -> dict[int, str]:
    """The character with which byte-level BPE writes each byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()


def _each_token_is_its_own_encoding(state: dict[str, Any], tokens: list[str]) -> bool:
    from tokenizers import Tokenizer

    bare_tokenizer = Tokenizer.from_str(
        json.dumps({**state, "pre_tokenizer": None, "post_processor": None, "added_tokens": []})
    )
    encodings = bare_tokenizer.encode_batch_fast(tokens, add_special_tokens=False)
    vocabulary = state["model"]["vocab"]
    return all(encoding.ids == [vocabulary[token]] for encoding, token in zip(encodings, tokens, strict=True))


def _same_characters() -> bool:
    """Whether tiktoken and `tokenizers` have the same letters, numbers and white space.

    Only planes 0 to 3 and 14 are compared: the other planes are empty or private and contain none of these.
    """
    import tiktoken
    from tokenizers import Regex, pre_tokenizers

    points = [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xF0000)]
    all_characters = "".join(map(chr, points))
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    matched_by_tiktoken = ""
    for pattern in (r"\p{L}+", r"\p{N}+", r"\s+"):
        matcher = tiktoken.Encoding("matcher", pat_str=pattern, mergeable_ranks=single_bytes, special_tokens={})
        matched_by_tiktoken = bytes(matcher.encode_ordinary(all_characters)).decode()
        pieces = pre_tokenizers.Split(Regex(pattern), "removed", invert=True).pre_tokenize_str(all_characters)
        if matched_by_tiktoken != "".join(text for text, _ in pieces):
            return False
    # the last pattern matched white space, which SPACES repeats for Python's `re`
    return set(re.findall(f"[{SPACES}]", all_characters)) == set(matched_by_tiktoken)
