"""Encoding gives the ids of `tokenizers` for every text, for any parts, processes and faster encoders."""

import importlib.util
import json
import random
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
from transformers import PreTrainedTokenizerFast

from minigpt.data import encoding as encoding_module
from minigpt.data.encoding import DocumentBatch, Encoder, EncoderSpec, Part, batches, encode_all, parts
from minigpt.data.fast_encoders import LONGEST, fast_encoder
from minigpt.data.tokenizer import train_bpe, train_characters
from minigpt.utils.errors import UserError
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
    spec = EncoderSpec.from_tokenizer(tokenizer, np.dtype("<u2"), large=fast)
    return Encoder(spec if fast else EncoderSpec(spec.tokenizer_json, spec.end_of_text, spec.dtype))


def random_text(generator: np.random.Generator, spaces: float) -> str:
    """Up to 2,000 letters, digits and signs that the tokenizers know, of which about `spaces` are white space."""
    length = generator.integers(0, 2000)
    signs = generator.choice([*"abXY019,.;:!?'_-é你"], length)
    gaps = generator.choice([*"  \n\t"], length)
    return "".join(np.where(generator.random(length) < spaces, gaps, signs))


def divided(text: str, generator: np.random.Generator) -> list[Part]:
    """The document `text` in random pieces, some of them empty."""
    bounds = [0, *sorted(generator.integers(0, len(text) + 1, generator.integers(0, 30)).tolist()), len(text)]
    pieces: list[Part] = [(text[start:end], False) for start, end in pairwise(bounds)]
    return [*pieces, ("", True)]


def spaces_and_words(seed: int) -> str:
    """Text that is difficult for GPT-2's pattern: runs of all kinds of spaces, contractions, numbers, marks."""
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
def test_the_faster_encoder_gives_the_ids_of_tokenizers_for_any_spaces(vocab_size: int) -> None:
    texts = [spaces_and_words(seed) for seed in range(3000)]
    tokenizer = train_bpe([TEXT, *texts[:500]], vocab_size)
    assert fast_encoder(tokenizer.backend_tokenizer.to_str()) is not None
    fast, plain = encoder(tokenizer).encode(texts), encoder(tokenizer, fast=False).encode(texts)
    assert [text for text, a, b in zip(texts, fast, plain, strict=True) if not np.array_equal(a, b)] == []


@needs_tiktoken
@pytest.mark.slow
def test_the_faster_encoder_gives_the_ids_of_tokenizers_for_every_character() -> None:
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
def test_ten_megabytes_of_one_character_have_the_ids_of_tokenizers(unit: str) -> None:
    tokenizer = train_bpe([TEXT], 400)
    text = unit * (10_000_000 // len(unit.encode()))
    pieces = [piece for piece, _ in parts([(text, True)], whole=False)]
    assert len(text) > LONGEST
    fast, (whole,) = encoder(tokenizer).encode(pieces), encoder(tokenizer, fast=False).encode([text])
    assert np.array_equal(np.concatenate(fast), whole)


@needs_tiktoken
def test_no_faster_encoder_is_used_where_the_ids_could_differ() -> None:
    def changed(old: str, new: str) -> str:
        assert old in original
        return original.replace(old, new)

    original = train_bpe(["aaaa bbbb abab " * 9], 262).backend_tokenizer.to_str()
    assert fast_encoder(original) is not None
    assert fast_encoder(changed('"add_prefix_space":false', '"add_prefix_space":true')) is None
    assert fast_encoder(changed('"normalizer":null', '"normalizer":{"type":"NFC"}')) is None
    assert fast_encoder(changed('"ignore_merges":false', '"ignore_merges":true')) is None
    assert fast_encoder(changed('"special":true', '"special":false')) is None
    assert fast_encoder(train_characters(["abc"]).backend_tokenizer.to_str()).library == "numpy"
    # "abc" is a token by the merge "a" + "bc" only: tiktoken would also join "ab" + "c", tokenizers does not
    state = json.loads(original)
    vocabulary = {token: index for token, index in state["model"]["vocab"].items() if len(token) == 1}
    for token in ("ab", "bc", "abc"):
        vocabulary[token] = len(vocabulary)
    state["model"] |= {"vocab": vocabulary, "merges": [["a", "b"], ["b", "c"], ["a", "bc"]]}
    state["added_tokens"] = []
    assert fast_encoder(json.dumps(state)) is None


def test_no_special_token_is_recognized_in_a_document(tokenizer: PreTrainedTokenizerFast) -> None:
    (ids,) = encoder(tokenizer).encode(["a<|endoftext|>b"])
    assert tokenizer.eos_token_id not in ids
    assert tokenizer("a<|endoftext|>b")["input_ids"].count(tokenizer.eos_token_id) == 1  # in a prompt it is special


def test_only_the_end_of_a_document_is_added(tokenizer: PreTrainedTokenizerFast) -> None:
    a, b = (tokenizer.convert_tokens_to_ids(letter) for letter in "ab")
    encoded = encoder(tokenizer).encode_batch(
        DocumentBatch(0, 0, [("a", True), ("", True), ("a", False), ("b", False)])
    )
    end = tokenizer.eos_token_id
    assert encoded.ids.tolist() == [a, end, end, a, b]
    assert (encoded.documents, encoded.text_bytes) == (2, 3)


def test_an_unknown_character_is_an_error_that_names_it() -> None:
    plain = encoder(train_characters(["abc"]))
    with pytest.raises(UserError, match=r"the character 'é' \(U\+00E9\) is not in"):
        plain.encode(["abc", "abéc"])
    with pytest.raises(UserError, match=r"documents 7 to 8 of the split, counted from 0: the character 'é'"):
        plain.encode_batch(DocumentBatch(7, 0, [("abc", True), ("é", True)]))


@pytest.mark.parametrize("fast", [True, False])
def test_a_lone_surrogate_is_named(tokenizer: PreTrainedTokenizerFast, fast: bool) -> None:
    with pytest.raises(UserError, match=r"half a surrogate pair \(U\+D83D\)"):
        encoder(tokenizer, fast).encode(["valid", "broken \ud83d"])


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_document_encoded_in_parts_has_the_ids_of_the_whole(tokenizer: PreTrainedTokenizerFast, step: int) -> None:
    assert EncoderSpec.from_tokenizer(tokenizer, np.dtype("<u2"), large=False).encodes_parts
    pieces = [(TEXT[start : start + step], False) for start in range(0, len(TEXT), step)] + [("", True)]
    text_parts = list(parts(pieces, whole=False, limit=10))
    assert len(text_parts) > 50
    plain = encoder(tokenizer, fast=False)
    ids_of_parts = plain.encode([text for text, _ in text_parts])
    assert np.array_equal(np.concatenate(ids_of_parts), plain.encode([TEXT])[0])
    assert list(parts(pieces, whole=True, limit=10)) == [(TEXT, True)]


@pytest.mark.parametrize("spaces", [0.0, 0.01, 0.2, 0.9])
def test_parts_of_random_texts_have_the_ids_of_the_whole(spaces: float) -> None:
    generator = np.random.default_rng(round(100 * spaces))
    texts = [random_text(generator, spaces) for _ in range(30)]
    plain = encoder(train_bpe(texts, 1000), fast=False)  # its tokens join whatever GPT-2's pattern lets it join
    for text in texts:
        limit = int(generator.integers(1, 100))
        ids_of_parts = plain.encode([part for part, _ in parts([(text, True)], whole=False, limit=limit)])
        assert np.array_equal(np.concatenate(ids_of_parts), plain.encode([text])[0])


@pytest.mark.parametrize("longest_word", [16_000_000, 500])
@pytest.mark.parametrize("spaces", [0.0, 0.01, 0.2, 0.9])
def test_parts_join_to_the_documents_and_do_not_depend_on_how_the_input_is_divided(
    monkeypatch, spaces: float, longest_word: int
) -> None:
    monkeypatch.setattr(encoding_module, "LONGEST_WORD", longest_word)
    generator = np.random.default_rng(round(100 * spaces))
    for limit in generator.integers(1, 100, 30).tolist():
        documents = [random_text(generator, spaces) for _ in range(3)]
        text_parts = list(parts([(text, True) for text in documents], whole=False, limit=limit))
        pieces = [piece for text in documents for piece in divided(text, generator)]
        assert list(parts(pieces, whole=False, limit=limit)) == text_parts
        joined = [""]
        for part, ends in text_parts:
            joined[-1] += str(part)
            joined += [""] if ends else []
        assert joined == [*documents, ""]


def first_safe_cut(text: str, start: int, limit: int) -> int | None:
    """Where the part that starts at `start` has to end: after a word, `limit` characters or more from `start`."""
    for end in range(start + limit, min(len(text), start + 4 * limit)):
        if re.fullmatch(r"\w", text[end - 1]) and text[end] in " \n":
            return end
    return None


@pytest.mark.parametrize("spaces", [0.0, 0.01, 0.2, 0.9])
def test_a_part_ends_at_the_first_safe_cut_and_is_never_shorter_than_the_limit(spaces: float) -> None:
    generator = np.random.default_rng(round(100 * spaces))
    safe_cuts = 0
    for limit in generator.integers(1, 100, 30).tolist():
        text, start = random_text(generator, spaces), 0
        for part, ends in parts([(text, True)], whole=False, limit=limit):
            safe_cut = first_safe_cut(text, start, limit)
            assert ends or len(part) >= limit
            assert safe_cut is None or start + len(part) == safe_cut
            safe_cuts += safe_cut is not None
            start += len(part)
    assert safe_cuts > 10 or spaces == 0


UNSPACED = {
    "base64": "aGVsbG8gd29ybGQ5Zm9yZXZlcjEyMw" * 40,
    "chinese": "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u8fd9\u662f\u4e00\u4e2a\u6587\u672c\u3002" * 60,
    "addresses": "www.example.com/it's.a_b,_c;d:e!f?'s,1" * 30,
}


@pytest.mark.parametrize("step", [1, 37, 10_000])
@pytest.mark.parametrize("kind", UNSPACED)
def test_text_without_spaces_is_cut_where_tokens_are_never_joined(kind: str, step: int) -> None:
    text = UNSPACED[kind]
    encoder = Encoder(EncoderSpec.from_tokenizer(train_bpe([*UNSPACED.values()], 400), np.dtype("<u2"), large=False))
    pieces = [(text[start : start + step], False) for start in range(0, len(text), step)]
    text_parts = list(parts([*pieces, ("", True)], whole=False, limit=10))
    assert len(text_parts) > 10
    ids_of_parts = np.concatenate(encoder.encode([part for part, _ in text_parts]))
    assert ids_of_parts.tolist() == encoder.encode([text])[0].tolist()


@pytest.mark.parametrize("step", [1, 37, 10_000])
def test_an_endless_word_is_cut_so_that_memory_is_bounded(monkeypatch, step: int) -> None:
    monkeypatch.setattr(encoding_module, "LONGEST_WORD", 100)
    text = "acgt" * 200 + "5 " + "tgca" * 70
    pieces = [(text[start : start + step], False) for start in range(0, len(text), step)]
    text_parts = [part for part, _ in parts([*pieces, ("", True)], whole=False, limit=10)]
    assert "".join(text_parts) == text
    assert max(map(len, text_parts)) == 100


def test_documents_stay_whole_for_a_tokenizer_that_may_join_across_spaces() -> None:
    tokenizer = train_bpe([TEXT], 300)
    tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    assert not EncoderSpec.from_tokenizer(tokenizer, np.dtype("<u2"), large=False).encodes_parts


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_come_back_in_order_from_any_number_of_processes(workers: int) -> None:
    tokenizer = train_bpe([TEXT], 300)
    texts = [(f"document {index} " * (index % 7), True) for index in range(200)]
    spec = EncoderSpec.from_tokenizer(tokenizer, np.dtype("<u2"))
    encoded = list(encode_all(batches(texts, characters=100), spec, workers))
    assert len(encoded) > 10
    at_once = Encoder(spec).encode_batch(DocumentBatch(0, 0, texts))
    assert np.array_equal(np.concatenate([batch.ids for batch in encoded]), at_once.ids)
    assert sum(batch.documents for batch in encoded) == 200
    starts = np.cumsum([0, *(batch.documents for batch in encoded)])
    assert [batch.document for batch in encoded] == starts[:-1].tolist()


def test_an_error_in_a_worker_reaches_the_caller() -> None:
    spec = EncoderSpec.from_tokenizer(train_characters(["abc"]), np.dtype("<u2"))
    with pytest.raises(UserError, match=r"document 1 of the split, counted from 0: the character 'x'"):
        list(encode_all(batches([("abc", True), ("x", True)], characters=3), spec, 2))


def test_workers_exit_when_their_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np, time, multiprocessing as m\n"
        "from minigpt.data.encoding import *; from minigpt.data.tokenizer import train_characters\n"
        "if __name__ == '__main__':\n"
        "    spec = EncoderSpec.from_tokenizer(train_characters(['abc']), np.dtype('<u2'))\n"
        "    results = encode_all(batches((('abc', True) for _ in range(99)), characters=3), spec, 2)\n"
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
    assert fast_encoder(train_characters([TEXT]).backend_tokenizer.to_str()).library == "numpy"
    assert fast_encoder(train_bpe([TEXT], 300).backend_tokenizer.to_str(), large=False) is None
