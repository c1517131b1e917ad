"""Laws of the pilot: it measures how hard a text is, and leaves nothing behind."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt.config.parser import parse_arguments
from minigpt.planning import pilot
from minigpt.planning.pilot import measure_text, pilot_bits_per_byte
from minigpt.planning.scaling_law import LAW, Fit, ModelSize, Observation, TextNumbers
from minigpt.planning.text_profile import TokenizedSample, Vocabulary, profile_text

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pilot, "STEPS", 30)
    monkeypatch.setattr(pilot, "SHORT_STEPS", 15)
    monkeypatch.setattr(pilot, "BLOCK_SIZE", 32)


def sample(ids: np.ndarray, size: int = 64, bytes_per_token: float = 2.0) -> TokenizedSample:
    train, validation = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    sizes = [round(bytes_per_token * len(split)) for split in (train, validation)]
    return TokenizedSample(Vocabulary(size, bytes_per_token), train, validation, *sizes)


def test_random_tokens_take_all_their_bits_and_a_pattern_takes_few() -> None:
    """Six bits for each of 64 random tokens, which are two bytes."""
    ids = np.random.default_rng(0).integers(0, 64, 20_000)
    assert pilot_bits_per_byte(sample(ids), CPU, 30) == pytest.approx(3, rel=0.05)
    assert pilot_bits_per_byte(sample(np.tile(np.arange(64), 300)), CPU, 30) < 1


def test_the_pilot_repeats_bit_for_bit_and_leaves_the_random_numbers_alone() -> None:
    ids = sample(np.random.default_rng(0).integers(0, 64, 5_000))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second = (pilot_bits_per_byte(ids, CPU, 30) for _ in range(2))
    assert first == second
    assert torch.equal(torch.rand(3), expected)


def test_a_harder_text_is_more_difficult(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    words = ["one ", "two ", "three ", "four ", "five ", "six "] * 500
    shuffled = [words[place] for place in generator.permutation(len(words))]
    difficulties = []
    for name, text in (("easy", words), ("hard", shuffled)):
        (tmp_path / name).write_text("".join(text), encoding="utf-8")
        args = parse_arguments(["--train_file", str(tmp_path / name)])
        difficulties.append(measure_text(args, CPU).difficulty)
    assert difficulties[0] < difficulties[1]


def test_a_text_shorter_than_a_block_is_repeated() -> None:
    assert pilot_bits_per_byte(sample(np.arange(20) % 8), CPU, 30) > 0


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_the_numbers_are_those_of_the_text_whatever_its_tokenizer(
    tokenizer: str, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pilots in vocabularies of their own, whose losses are those of the law for these numbers."""
    text = TextNumbers(difficulty=1.5, slope=0.7, vocabulary_gain=0.15)
    monkeypatch.setattr(pilot, "VOCABULARY_SIZES", (270, 290))
    for name, value in (("STEPS", 240), ("SHORT_STEPS", 60), ("BLOCK_SIZE", 128)):
        monkeypatch.setattr(pilot, name, value)

    def loss(sample: TokenizedSample, device: torch.device, steps: int) -> float:
        size = sample.vocabulary.size
        assert size in (270, 290)
        epochs = steps * pilot.BATCH_SIZE * pilot.BLOCK_SIZE / len(sample.train)
        run = Observation("text", size, ModelSize.of(64, 2, size), epochs * sample.train_bytes, epochs, math.nan)
        return Fit(LAW, {"text": text}).predict(run)

    monkeypatch.setattr(pilot, "pilot_bits_per_byte", loss)
    args = parse_arguments(["--train_file", str(text_file), "--tokenizer", tokenizer])
    found = measure_text(args, CPU)
    assert measure_text(args, CPU, profile_text(args, (270, 280, 290)).samples) == found
    for vocab_size in (270, 290):
        assert found.slope_with(vocab_size) == pytest.approx(text.slope_with(vocab_size), rel=0.03)
    assert found.difficulty == pytest.approx(text.difficulty, rel=0.03)
