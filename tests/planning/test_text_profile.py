"""Laws of what is known about a text before training: each figure is what a simpler computation gives."""

from collections.abc import Callable
from pathlib import Path

import pytest

from minigpt.config.parser import parse_arguments
from minigpt.data.corpora import open_corpus
from minigpt.data.prepare import prepare
from minigpt.data.tokenizer import train_bpe
from minigpt.planning.text_profile import nested_tokenizers, profile_text, scripts, validation_percentage
from minigpt.utils.errors import UserError


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
    assert [sample.vocabulary.size for sample in profile_text(args, (280, 50_000)).samples] == [280]
    assert [sample.vocabulary.size for sample in profile_text(args, (50_000,)).samples] == [largest]


def test_a_text_of_one_character_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a", encoding="utf-8")
    with pytest.raises(UserError, match="too short to train on one part"):
        profile_text(parse_arguments(["--train_file", str(tmp_path / "text.txt")]))


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
    (sample,) = profile.samples
    vocabulary = sample.vocabulary
    tokenizer = train_bpe([train], 280)
    ids = tokenizer(validation)["input_ids"]
    assert vocabulary.bytes_per_token == pytest.approx(len(validation.encode()) / len(ids), rel=0.01)


@pytest.mark.parametrize("source", ["--train_file", "--data"])
def test_the_sample_of_a_large_text_is_from_all_over_it(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a text whose letters change in the middle, it has about as many of both."""
    text = tmp_path / "text.txt"
    text.write_text("latin letters\n" * 4000 + "кириллица\n" * 5600, encoding="utf-8")
    words = ["--train_file", str(text), "--tokenizer_vocab_size", "300"]
    if source == "--data":
        words = ["--data", str(prepare(parse_arguments(words), tmp_path / "shards"))]
    sizes = {"TRAIN_SAMPLE_BYTES": 20_000, "PIECE_CHARACTERS": 1000, "PIECE_TOKENS": 250}
    for name, value in sizes.items():
        monkeypatch.setattr(f"minigpt.planning.text_profile.{name}", value)
    shares = profile_text(parse_arguments(words), sizes=(300,)).scripts
    assert 0.35 < shares["LATIN"] < 0.65
    assert 0.35 < shares["CYRILLIC"] < 0.65


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
