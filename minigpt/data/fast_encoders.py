"""Faster encoders that give the same ids as `tokenizers`.

Byte-level BPE with GPT-2's pattern is handed to tiktoken, if that is installed. tiktoken knows no merges, only tokens
and their ranks, so three things are checked first:

* every merge makes another token, so a token's rank tells which merge it was;
* `tokenizers` encodes the text of every token as that one token. Then no pair of neighbours that makes a known token
  can be anything but that token's own merge: the text of the token alone would otherwise have become something else;
* both libraries agree which characters are letters, numbers and spaces: their Unicode versions may differ.

tiktoken spends most of its time on the look-ahead of GPT-2's pattern, `\s+(?!\S)`, which leaves the last of several
spaces to the word behind them. Here a character that text does not hold (U+10FFFF is reserved for such uses) is put in
front of that last space instead; the pattern without the look-ahead, which a faster automaton can match, skips it.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Encode = Callable[[str], np.ndarray | None]  # None: this text is for `tokenizers`

LONGEST = 2_000_000  # characters; longer texts without a place to cut them are left to `tokenizers`

MARK = "\U0010ffff"

PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}\x{10FFFF}]+|\s+"

SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space

LAST_OF_SPACES = re.compile(f"(?<=[{SPACES}])(?=[{SPACES}][^{SPACES}])")

UNUSED_OPTIONS = (
    "dropout",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "byte_fallback",
    "ignore_merges",
)


@dataclass(frozen=True)
class FastBPE:
    """What a process needs to encode by tiktoken: the rank of every token's bytes, and the id of every rank."""

    ranks: dict[bytes, int]
    ids: np.ndarray

    def encoder(self) -> Encode:
        import tiktoken

        encoding = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=self.ranks, special_tokens={})

        def encode(text: str) -> np.ndarray | None:
            if len(text) > LONGEST or MARK in text:
                return None
            return self.ids[np.array(encoding.encode_ordinary(LAST_OF_SPACES.sub(MARK, text)), dtype=np.intp)]

        return encode


@dataclass(frozen=True)
class FastCharacters:
    """The id of every code point, -1 where there is none; the last entry stands for all beyond it."""

    ids: np.ndarray

    def encoder(self) -> Encode:
        def encode(text: str) -> np.ndarray | None:
            points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
            ids = self.ids[np.minimum(points, len(self.ids) - 1)]
            return None if len(ids) and ids.min() < 0 else ids

        return encode


def fast_bpe(tokenizer_json: str) -> FastBPE | None:
    """A stand-in for a byte-level BPE, or None where tiktoken is missing or would not give the same ids."""
    try:
        import tiktoken  # noqa: F401
    except ImportError:
        return None
    state = json.loads(tokenizer_json)
    model, ranks = state["model"], {}
    if not _is_gpt2_like(state) or any(model.get(name) for name in UNUSED_OPTIONS):
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


def fast_characters(tokenizer_json: str) -> FastCharacters | None:
    """A stand-in for a vocabulary of characters, or None if the tokenizer is something else."""
    state = json.loads(tokenizer_json)
    vocabulary = state["model"].get("vocab")
    splits = (state["pre_tokenizer"] or {}).get("pattern") == {"Regex": r"[\s\S]"}
    if state["model"]["type"] != "WordLevel" or not splits or not _is_plain(state):
        return None
    if state["model"].get("unk_token") in vocabulary:
        return None
    points = {ord(token): index for token, index in vocabulary.items() if len(token) == 1}
    ids = np.full(max(points) + 2, -1, dtype=np.int64)
    ids[list(points)] = list(points.values())
    return FastCharacters(ids)


def _is_gpt2_like(state: dict[str, Any]) -> bool:
    pre_tokenizer = state["pre_tokenizer"] or {}
    return (
        state["model"]["type"] == "BPE"
        and _is_plain(state)
        and pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer["use_regex"]
        and not pre_tokenizer["add_prefix_space"]
    )


def _is_plain(state: dict[str, Any]) -> bool:
    """Whether text is encoded as it stands: not normalised, and no added token is looked for in it."""
    return state["normalizer"] is None and all(token["special"] for token in state["added_tokens"])


def _byte_characters() -> dict[int, str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()


def _each_token_is_its_own_encoding(state: dict[str, Any], tokens: list[str]) -> bool:
    from tokenizers import Tokenizer

    alone = Tokenizer.from_str(
        json.dumps({**state, "pre_tokenizer": None, "post_processor": None, "added_tokens": []})
    )
    encodings = alone.encode_batch_fast(tokens, add_special_tokens=False)
    vocabulary = state["model"]["vocab"]
    return all(encoding.ids == [vocabulary[token]] for encoding, token in zip(encodings, tokens, strict=True))


def _same_characters() -> bool:
    """Whether both libraries see the same letters, numbers and spaces.

    Only planes 0 to 3 and 14 are compared: the others are empty or private, and have none of these.
    """
    import tiktoken
    from tokenizers import Regex, pre_tokenizers

    points = [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xF0000)]
    every = "".join(map(chr, points))
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    for kind in (r"\p{L}+", r"\p{N}+", r"\s+"):
        matcher = tiktoken.Encoding("matcher", pat_str=kind, mergeable_ranks=single_bytes, special_tokens={})
        theirs = bytes(matcher.encode_ordinary(every)).decode()
        ours = pre_tokenizers.Split(Regex(kind), "removed", invert=True).pre_tokenize_str(every)
        if theirs != "".join(text for text, _ in ours):
            return False
    return set(re.findall(f"[{SPACES}]", every)) == set(theirs)
