"""Laws of encoding: the ids are those of `tokenizers` for every text, however the work is cut, shared or sped up."""

import importlib.util
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from transformers import PreTrainedTokenizerFast

from minigpt.data.encoding import Batch, Encoder, Encoding, batches, encode_all, parts
from minigpt.data.fast_encoders import LONGEST, fast_bpe, fast_characters
from minigpt.data.tokenizer import train_bpe, train_characters
from support.runs import ROOT

TEXT = "The king said: it's 1597, isn't it?\n\n  The queen laughed — “no”, she said;\tnaïve, 你好 🙂.\r\n" * 20
HOSTILE = ["", " ", "\n\n", "\0", "a\0b", "<|endoftext|>", "x" * 10_000, " " * 999, "\n" * 999 + "'s", "é" * 9_999]
HOSTILE += ["".join(map(chr, range(1, 0x300))), "🙂\u200d🙂", "a \n b\r\n\r\n  c\u3000\u3000d\x85e  \U0010ffff  f"]
needs_tiktoken = pytest.mark.skipif(importlib.util.find_spec("tiktoken") is None, reason="tiktoken is an extra")


@pytest.fixture(scope="module", params=["bpe", "char"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    if request.param == "bpe":
        return train_bpe([TEXT], 400)
    return train_characters([TEXT, *HOSTILE])


def encoder(tokenizer: PreTrainedTokenizerFast, fast: bool = True) -> Encoder:
    encoding = Encoding.of(tokenizer, np.dtype("<u2"))
    plain = Encoding(encoding.tokenizer_json, encoding.end_of_text, encoding.dtype)
    return Encoder(encoding if fast else plain)


def spaces_and_words(seed: int) -> str:
    """Text that is hard on GPT-2's pattern: runs of all kinds of spaces, contractions, numbers, marks."""
    alphabet = [*" \n\t\r\x85\xa0\u3000\x1c\u200b" * 3, *"ab1'sdtm!.½²", "'ll", "'s", "é", "你", "\u0301", "🙂", "\0"]
    generator = random.Random(seed)
    return "".join(generator.choices(alphabet, k=generator.randrange(80)))


def test_every_text_survives_the_round_trip(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [TEXT, *HOSTILE]
    for text, ids in zip(texts, encoder(tokenizer).encode(texts), strict=True):
        assert tokenizer.decode(ids) == text


def test_ids_are_those_of_tokenizers(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [TEXT, *HOSTILE]
    expected = encoder(tokenizer, fast=False).encode(texts)
    for text, fast, plain in zip(texts, encoder(tokenizer).encode(texts), expected, strict=True):
        assert np.array_equal(fast, plain)
        assert fast.tolist() == tokenizer.backend_tokenizer.encode(text).ids or "<|endoftext|>" in text


@needs_tiktoken
@pytest.mark.parametrize("vocab_size", [257, 300, 2000])
def test_the_fast_road_gives_the_ids_of_tokenizers_for_any_spaces(vocab_size: int) -> None:
    texts = [spaces_and_words(seed) for seed in range(3000)]
    tokenizer = train_bpe([TEXT, *texts[:500]], vocab_size)
    assert fast_bpe(tokenizer.backend_tokenizer.to_str()) is not None
    fast, plain = encoder(tokenizer).encode(texts), encoder(tokenizer, fast=False).encode(texts)
    assert [text for text, a, b in zip(texts, fast, plain, strict=True) if not np.array_equal(a, b)] == []


@needs_tiktoken
@pytest.mark.slow
def test_the_fast_road_gives_the_ids_of_tokenizers_for_every_character() -> None:
    texts = []
    for first in range(0, 0x110000, 64):
        points = [chr(point) for point in range(first, first + 64) if not 0xD800 <= point < 0xE000]
        texts += ["".join(points), "a".join(points), " ".join(points), "1".join(points), "  ".join(points)]
    tokenizer = train_bpe([TEXT], 400)
    fast, plain = encoder(tokenizer).encode(texts), encoder(tokenizer, fast=False).encode(texts)
    assert [text for text, a, b in zip(texts, fast, plain, strict=True) if not np.array_equal(a, b)] == []


@needs_tiktoken
@pytest.mark.slow
@pytest.mark.parametrize("unit", ["a", " ", "\n", "b1!", "你好", "\0"])
def test_ten_megabytes_of_one_kind_are_encoded_alike(unit: str) -> None:
    tokenizer = train_bpe([TEXT], 400)
    text = unit * (10_000_000 // len(unit.encode()))
    pieces = [piece for piece, _ in parts([(text, True)], whole=False)]
    assert len(text) > LONGEST
    fast, (whole,) = encoder(tokenizer).encode(pieces), encoder(tokenizer, fast=False).encode([text])
    assert np.array_equal(np.concatenate(fast), whole)


@needs_tiktoken
def test_the_fast_road_is_not_taken_where_the_ids_could_differ() -> None:
    def changed(old: str, new: str) -> str:
        assert old in original
        return original.replace(old, new)

    original = train_bpe(["aaaa bbbb abab " * 9], 262).backend_tokenizer.to_str()
    assert fast_bpe(original) is not None
    assert fast_bpe(changed('"add_prefix_space":false', '"add_prefix_space":true')) is None
    assert fast_bpe(changed('"normalizer":null', '"normalizer":{"type":"NFC"}')) is None
    assert fast_bpe(changed('"ignore_merges":false', '"ignore_merges":true')) is None
    assert fast_bpe(changed('"special":true', '"special":false')) is None
    assert fast_bpe(train_characters(["abc"]).backend_tokenizer.to_str()) is None
    # "abc" can be known by a merge that "ab" + "c" is not: tiktoken would join them, tokenizers does not
    state = json.loads(original)
    vocabulary = {token: index for token, index in state["model"]["vocab"].items() if len(token) == 1}
    for token in ("ab", "bc", "abc"):
        vocabulary[token] = len(vocabulary)
    state["model"] |= {"vocab": vocabulary, "merges": [["a", "b"], ["b", "c"], ["a", "bc"]]}
    state["added_tokens"] = []
    assert fast_bpe(json.dumps(state)) is None


def test_nothing_in_a_document_is_special(tokenizer: PreTrainedTokenizerFast) -> None:
    (ids,) = encoder(tokenizer).encode(["a<|endoftext|>b"])
    assert tokenizer.eos_token_id not in ids
    assert tokenizer("a<|endoftext|>b")["input_ids"].count(tokenizer.eos_token_id) == 1  # in a prompt it is


def test_nothing_is_inserted_but_the_end_of_a_document(tokenizer: PreTrainedTokenizerFast) -> None:
    a, b = (tokenizer.convert_tokens_to_ids(letter) for letter in "ab")
    encoded = encoder(tokenizer).encode_batch(Batch(0, 0, [("a", True), ("", True), ("a", False), ("b", False)]))
    end = tokenizer.eos_token_id
    assert encoded.ids.tolist() == [a, end, end, a, b]
    assert (encoded.documents, encoded.text_bytes) == (2, 3)


def test_an_unknown_character_is_named_and_not_dropped() -> None:
    plain = encoder(train_characters(["abc"]))
    with pytest.raises(ValueError, match=r"the character 'é' \(U\+00E9\) is not in"):
        plain.encode(["abc", "abéc"])
    with pytest.raises(ValueError, match=r"documents 7 to 8, counted from 0: the character 'é'"):
        plain.encode_batch(Batch(7, 0, [("abc", True), ("é", True)]))


@pytest.mark.parametrize("fast", [True, False])
def test_a_lone_surrogate_is_named(tokenizer: PreTrainedTokenizerFast, fast: bool) -> None:
    with pytest.raises(ValueError, match=r"half a surrogate pair \(U\+D83D\)"):
        encoder(tokenizer, fast).encode(["fine", "broken \ud83d"])


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_document_encoded_in_parts_has_the_ids_of_the_whole(tokenizer: PreTrainedTokenizerFast, step: int) -> None:
    assert Encoding.of(tokenizer, np.dtype("<u2")).encodes_parts
    pieces = [(TEXT[i : i + step], False) for i in range(0, len(TEXT), step)] + [("", True)]
    cut = list(parts(pieces, whole=False, limit=10))
    assert len(cut) > 50
    assert [ends for _, ends in cut] == [False] * (len(cut) - 1) + [True]
    assert cut == list(parts([(TEXT, True)], whole=False, limit=10))
    plain = encoder(tokenizer)
    assert np.array_equal(np.concatenate(plain.encode([text for text, _ in cut])), plain.encode([TEXT])[0])
    assert list(parts(pieces, whole=True, limit=10)) == [(TEXT, True)]


UNSPACED = {
    "base64": "aGVsbG8gd29ybGQ5Zm9yZXZlcjEyMw" * 40,
    "chinese": "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u8fd9\u662f\u4e00\u4e2a\u6587\u672c\u3002" * 60,
    "addresses": "www.example.com/it's.a_b,_c;d:e!f?'s,1" * 30,
}


@pytest.mark.parametrize("step", [1, 37, 10_000])
@pytest.mark.parametrize("kind", UNSPACED)
def test_text_without_spaces_is_cut_where_nothing_is_joined(kind: str, step: int) -> None:
    text = UNSPACED[kind]
    encoder = Encoder(Encoding.of(train_bpe([*UNSPACED.values()], 400), np.dtype("<u2"), large=False))
    pieces = [(text[start : start + step], False) for start in range(0, len(text), step)]
    cut = list(parts([*pieces, ("", True)], whole=False, limit=10))
    assert len(cut) > 10
    assert cut == list(parts([(text, True)], whole=False, limit=10))
    in_parts = np.concatenate(encoder.encode([part for part, _ in cut]))
    assert in_parts.tolist() == encoder.encode([text])[0].tolist()


@pytest.mark.parametrize("step", [1, 37, 10_000])
def test_a_word_without_end_is_cut_so_that_memory_is_bounded(monkeypatch, step: int) -> None:
    monkeypatch.setattr("minigpt.data.encoding.LONGEST_WORD", 100)
    text = "acgt" * 200 + "5 " + "tgca" * 70
    pieces = [(text[start : start + step], False) for start in range(0, len(text), step)]
    cut = [part for part, _ in parts([*pieces, ("", True)], whole=False, limit=10)]
    assert "".join(cut) == text
    assert max(map(len, cut)) == 100


def test_a_tokenizer_that_may_join_across_spaces_gets_whole_documents() -> None:
    tokenizer = train_bpe([TEXT], 300)
    tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    assert not Encoding.of(tokenizer, np.dtype("<u2")).encodes_parts


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_come_back_in_order_from_any_number_of_processes(workers: int) -> None:
    tokenizer = train_bpe([TEXT], 300)
    texts = [(f"document {index} " * (index % 7), True) for index in range(200)]
    encoding = Encoding.of(tokenizer, np.dtype("<u2"))
    encoded = list(encode_all(batches(texts, characters=100), encoding, workers))
    assert len(encoded) > 10
    one = Encoder(encoding).encode_batch(Batch(0, 0, texts))
    assert np.array_equal(np.concatenate([part.ids for part in encoded]), one.ids)
    assert sum(part.documents for part in encoded) == 200
    starts = np.cumsum([0, *(part.documents for part in encoded)])
    assert [part.document for part in encoded] == starts[:-1].tolist()


def test_an_error_of_a_worker_is_the_callers() -> None:
    encoding = Encoding.of(train_characters(["abc"]), np.dtype("<u2"))
    with pytest.raises(ValueError, match=r"documents 1 to 1, counted from 0: the character 'x'"):
        list(encode_all(batches([("abc", True), ("x", True)], characters=3), encoding, 2))


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np, time, multiprocessing as m\n"
        "from minigpt.data.encoding import *; from minigpt.data.tokenizer import train_characters\n"
        "if __name__ == '__main__':\n"
        "    encoding = Encoding.of(train_characters(['abc']), np.dtype('<u2'))\n"
        "    results = encode_all(batches((('abc', True) for _ in range(99)), characters=3), encoding, 2)\n"
        "    next(results); print(*(p.pid for p in m.active_children()), flush=True); time.sleep(60)\n"
    )
    (tmp_path / "main.py").write_text(code)
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "main.py"], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.1)


def test_characters_are_encoded_without_a_tokenizer_of_words() -> None:
    assert fast_characters(train_characters([TEXT]).backend_tokenizer.to_str()) is not None
    assert fast_characters(train_bpe([TEXT], 300).backend_tokenizer.to_str()) is None
