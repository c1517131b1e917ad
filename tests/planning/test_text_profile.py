"""Laws of what is known about a text before training: each figure is what a simpler computation gives."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minigpt.config.parser import parse_arguments
from minigpt.data.corpora import open_corpus
from minigpt.data.prepare import prepare
from minigpt.data.tokenizer import train_bpe
from minigpt.planning.text_profile import nested_tokenizers, ngram_bits, profile_text, scripts, validation_percentage


def bits_of_the_definition(train: list[int], ids: list[int], size: int, order: int) -> list[float]:
    """Witten-Bell's probabilities of `ids`, as bits, from dictionaries; contexts wrap around as in np.roll."""
    followers: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for place, token in enumerate(train):
        for length in range(order):
            followers[tuple(train[place - back] for back in range(1, length + 1))][token] += 1

    def probability(context: tuple[int, ...], token: int, length: int) -> float:
        shorter = probability(context, token, length - 1) if length else 1 / size
        seen = followers.get(context[:length])
        return shorter if not seen else (seen[token] + len(seen) * shorter) / (seen.total() + len(seen))

    contexts = [tuple(ids[place - back] for back in range(1, order)) for place in range(len(ids))]
    return [-math.log2(probability(*pair, order - 1)) for pair in zip(contexts, ids, strict=True)]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ngrams_predict_as_their_definition_says(order: int) -> None:
    generator = np.random.default_rng(0)
    train, ids = generator.integers(0, 6, 300), generator.integers(0, 8, 200)  # 6 and 7 are never seen in training
    expected = bits_of_the_definition(train.tolist(), ids.tolist(), 9, order)
    assert ngram_bits(train, ids, 9, order)[-1] == pytest.approx(np.mean(expected))


def test_random_tokens_take_the_bits_of_their_number_and_repeated_ones_none() -> None:
    generator = np.random.default_rng(0)
    train, ids = generator.integers(0, 16, 200_000), generator.integers(0, 16, 20_000)
    assert ngram_bits(train, ids, 16, 2) == pytest.approx([4, 4], abs=0.01)
    repeated = np.tile(np.arange(16), 2000)
    assert ngram_bits(repeated, repeated[:1600], 16, 2) == pytest.approx([4, 0], abs=0.02)


def test_a_nested_tokenizer_is_the_one_trained_with_that_size(text_file: Path) -> None:
    """All from the same text, so that merges of the small one are the first of the large one."""
    text = text_file.read_text(encoding="utf-8")
    sizes = (260, 270, 280)
    nested = list(nested_tokenizers(train_bpe([text], 280).backend_tokenizer, sizes))
    for tokenizer, size in zip(nested, sizes, strict=True):
        assert tokenizer.encode(text).ids == train_bpe([text], size)(text)["input_ids"]


def test_a_short_text_has_only_the_vocabularies_that_it_can_fill(text_file: Path) -> None:
    args = parse_arguments(["--train_file", str(text_file)])
    largest = len(train_bpe([text_file.read_text(encoding="utf-8")], 50_000))
    assert 280 < largest < 400
    assert [vocabulary.size for vocabulary in profile_text(args, (280, 50_000)).vocabularies] == [280]
    assert [vocabulary.size for vocabulary in profile_text(args, (50_000,)).vocabularies] == [largest]


@pytest.mark.parametrize("source", ["--train_file", "--data"])
def test_the_profile_is_that_of_the_prepared_tokens(text_file: Path, tmp_path: Path, source: str) -> None:
    """Also of tokens that were prepared before; the text is small enough to be looked at as a whole."""
    words = ["--train_file", str(text_file), "--tokenizer_vocab_size", "280"]
    folder = prepare(parse_arguments(words), tmp_path / "shards")
    args = parse_arguments(words if source == "--train_file" else ["--data", str(folder)])
    profile = profile_text(args, sizes=(280,))
    train, validation = (
        "".join(str(piece) for piece, _ in split.pieces())
        for split in (open_corpus(parse_arguments(words)).train, open_corpus(parse_arguments(words)).validation)
    )
    assert profile.train_bytes == pytest.approx(len(train.encode()), rel=0.01)
    (vocabulary,) = profile.vocabularies
    tokenizer = train_bpe([train], 280)
    ids = tokenizer(validation)["input_ids"]
    assert vocabulary.bytes_per_token == pytest.approx(len(validation.encode()) / len(ids), rel=0.01)
    frequency = Counter(tokenizer(train)["input_ids"])
    bits = -sum(math.log2(frequency[token] / frequency.total()) for token in ids if frequency[token]) / len(ids)
    assert vocabulary.ngram_bits[0] * vocabulary.bytes_per_token == pytest.approx(bits, rel=0.02)
    assert list(vocabulary.ngram_bits) == sorted(vocabulary.ngram_bits, reverse=True)


def test_scripts_are_shares_of_letters() -> None:
    assert scripts(["abc def 123!", "где", "中文"]) == {
        "LATIN": pytest.approx(6 / 11), "CYRILLIC": pytest.approx(3 / 11), "CJK": pytest.approx(2 / 11)
    }  # fmt: skip
    assert scripts(["123 !?"]) == {}


@pytest.mark.parametrize(("size", "expected"), [(100_000, 10), (20_000_000, 1), (3_000_000, 6.7)])
def test_little_of_a_large_text_is_held_out(
    size: int, expected: float, tmp_path: Path, tiny_text: Callable[[Path, int], Path]
) -> None:
    args = parse_arguments(["--train_file", str(tiny_text(tmp_path / "text.txt", size))])
    assert validation_percentage(args) == pytest.approx(expected)


@pytest.fixture
def tiny_text() -> Callable[[Path, int], Path]:
    def write(path: Path, size: int) -> Path:
        path.write_text("word\n" * (size // 5), encoding="utf-8")
        return path

    return write
