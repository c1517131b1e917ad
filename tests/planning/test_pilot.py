"""Laws of the pilot: it measures how hard a text is, and leaves nothing behind."""

from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt.config.parser import parse_arguments
from minigpt.planning import pilot
from minigpt.planning.pilot import measure_slope, measure_text, pilot_bits_per_byte
from minigpt.planning.scaling_law import LAW, ModelSize
from minigpt.planning.text_profile import TokenizedSample, Vocabulary

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pilot, "STEPS", 30)
    monkeypatch.setattr(pilot, "SHORT_STEPS", 15)
    monkeypatch.setattr(pilot, "BLOCK_SIZE", 32)


def sample(ids: np.ndarray, size: int = 64, bytes_per_token: float = 2.0) -> TokenizedSample:
    train, validation = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    text_bytes = round(bytes_per_token * len(validation))
    return TokenizedSample(Vocabulary(size, bytes_per_token), train, validation, text_bytes)


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


def test_a_harder_text_is_more_difficult() -> None:
    generator = np.random.default_rng(0)
    easy = np.tile(np.arange(64), 200)
    hard = np.where(generator.random(len(easy)) < 0.5, generator.permutation(easy), easy)
    of_easy, of_hard = (measure_text([sample(ids)], CPU) for ids in (easy, hard))
    assert of_easy.difficulties < of_hard.difficulties


def test_a_text_shorter_than_a_block_is_repeated() -> None:
    assert pilot_bits_per_byte(sample(np.arange(20) % 8), CPU, 30) > 0


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_the_slope_is_that_of_the_text_whatever_its_tokenizer(
    tokenizer: str, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pilots in vocabularies of their own, whose losses are those of the law for this slope."""
    slope = 0.7
    monkeypatch.setattr(pilot, "SLOPE_SIZES", (270, 290))
    for name, value in (("STEPS", 240), ("SHORT_STEPS", 60), ("BLOCK_SIZE", 128)):
        monkeypatch.setattr(pilot, name, value)

    def loss(sample: TokenizedSample, device: torch.device, steps: int) -> float:
        assert sample.vocabulary.size in (270, 290)
        tokens, model = steps * pilot.BATCH_SIZE * pilot.BLOCK_SIZE, ModelSize.of(64, 2, sample.vocabulary.size)
        return LAW.relative_loss(model, tokens, tokens / len(sample.train), slope)

    monkeypatch.setattr(pilot, "pilot_bits_per_byte", loss)
    args = parse_arguments(["--train_file", str(text_file), "--tokenizer", tokenizer])
    assert measure_slope(args, CPU) == pytest.approx(slope, rel=0.03)


def test_difficulties_lie_on_the_parabola_of_the_pilots_and_the_slope_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pilots have the losses of the law for these numbers with 512, 2,048 and 8,192 ids."""
    for name, value in (("STEPS", 240), ("SHORT_STEPS", 60), ("BLOCK_SIZE", 128)):
        monkeypatch.setattr(pilot, name, value)
    slope = 1.4
    difficulties = {size: 0.6 * 1.01 ** (octaves**2) for octaves, size in enumerate((1024, 2048, 4096, 8192, 16384))}
    difficulties[512] = 0.6 * 1.01
    ids = np.zeros(400_000, np.int64)
    samples = [TokenizedSample(Vocabulary(size, 3.0), ids, ids, 30) for size in sorted(difficulties)]

    def loss(sample: TokenizedSample, device: torch.device, steps: int) -> float:
        size = sample.vocabulary.size
        assert size in pilot.VOCABULARY_SIZES
        tokens, model = steps * pilot.BATCH_SIZE * pilot.BLOCK_SIZE, ModelSize.of(64, 2, size)
        return difficulties[size] * LAW.relative_loss(model, tokens, tokens / len(ids), slope)

    monkeypatch.setattr(pilot, "pilot_bits_per_byte", loss)
    text = measure_text(samples, CPU)
    expected = [difficulties[sample.vocabulary.size] for sample in samples]
    assert text.slope == pytest.approx(slope, rel=0.03)
    assert text.difficulties == pytest.approx(expected, rel=0.01)
