"""Laws of the fitted loss: the fit finds the law that made the data and predicts what it has not seen."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minigpt.planning.scaling_law import (
    LAW,
    TYPICAL_GAIN,
    Fit,
    ModelSize,
    Observation,
    ScalingLaw,
    TextNumbers,
    fit,
    fit_texts,
)

TRUTH = ScalingLaw(0.08, 0.35, 0.05, 0.4, 0.1, 0.7, 0.15, 0.5, 6.0, 0.07, 0.2)
TEXTS = {"a": TextNumbers(0.4, 1.4, 0.05), "b": TextNumbers(0.6, 0.6, 0.2), "c": TextNumbers(0.5, 1.1, 0.1)}
TEXT_BYTES = {"a": 9e5, "b": 6e6, "c": 3e9}


def of_layers(parameters: float) -> ModelSize:
    """A model with so many weights in layers, and embeddings of a typical size."""
    return ModelSize(parameters, 1000 * parameters**0.5)


def true_loss(text: str, vocab_size: int, size: ModelSize, text_bytes: float) -> float:
    slope = TEXTS[text].slope * (2048 / vocab_size) ** TEXTS[text].vocabulary_gain
    return TEXTS[text].difficulty * TRUTH.relative_loss(size, text_bytes, text_bytes / TEXT_BYTES[text], slope)


def observed(text: str, vocab_size: int, size: ModelSize, text_bytes: float, noise: float = 0.0) -> Observation:
    loss = true_loss(text, vocab_size, size, text_bytes) * math.exp(noise)
    return Observation(text, vocab_size, size, text_bytes, text_bytes / TEXT_BYTES[text], loss)


def observations(noise: float = 0.0) -> list[Observation]:
    """Runs of four sizes, three lengths and two vocabularies, on three texts, that follow `TRUTH`."""
    generator = np.random.default_rng(0)
    return [
        observed(text, vocab_size, size, text_bytes, noise * generator.normal())
        for text in TEXTS
        for vocab_size in (512, 4096)
        for size in map(of_layers, (1e5, 4e5, 1.8e6, 5e6))
        for text_bytes in (6e5, 2.4e6, 9e6)
    ]


def test_the_prediction_is_the_formula() -> None:
    """Written out here for a text of 2 megabytes that is read three times, with 8,192 ids."""
    read = 2 * (1 + 6 * (1 - math.exp(-2 / 6)))
    over_fitting = 0.07 * 2 * ((0.3 / 2) ** 2 + 0.2 * 0.5 / 2)
    size = 0.08 * 0.5**-0.35 + 0.05 * 0.4**-0.4
    expected = 3 * (1 + size + 1.7 * 4**-0.2 * 0.7 * (read + 0.15) ** -0.5 + over_fitting)
    run = Observation("text", 8192, ModelSize(5e5, 3e5), 6e6, 3.0, math.nan)
    assert Fit(TRUTH, {"text": TextNumbers(3, 1.7, 0.2)}).predict(run) == pytest.approx(expected)


def test_the_fit_predicts_what_made_the_data() -> None:
    found = fit(observations())
    for run in observations():
        assert found.predict(run) == pytest.approx(run.loss, rel=5e-3)
    steep, flat = found.texts["a"].slope, found.texts["b"].slope
    assert steep / flat == pytest.approx(TEXTS["a"].slope / TEXTS["b"].slope, rel=0.1)


def test_a_larger_model_with_more_text_is_predicted_within_the_noise() -> None:
    found = fit(observations(noise=0.005))
    larger = [observed(text, vocab_size, of_layers(2e7), 3e7) for text in TEXTS for vocab_size in (512, 8192)]
    new = [run for run in larger if run.epochs < 1]
    assert new
    for run in new:
        assert found.predict(run) == pytest.approx(run.loss, rel=0.03)


def test_the_numbers_of_a_text_are_found_where_the_law_is_known() -> None:
    """Two vocabularies tell what the slope loses with a larger one, and two lengths the slope."""
    runs = [
        observed("a", vocab_size, of_layers(4e5), text_bytes)
        for vocab_size in (512, 4096)
        for text_bytes in (6e5, 2.4e6)
    ]
    found = fit_texts(runs, TRUTH)
    assert found.law == TRUTH
    assert found.texts["a"].slope == pytest.approx(TEXTS["a"].slope, rel=0.02)
    assert found.texts["a"].vocabulary_gain == pytest.approx(TEXTS["a"].vocabulary_gain, abs=0.02)
    larger = observed("a", 8192, of_layers(1.8e6), 9e6)
    assert found.predict(larger) == pytest.approx(larger.loss, rel=0.01)


def test_one_run_leaves_the_slope_of_a_typical_text() -> None:
    (run,) = observations()[:1]
    found = fit_texts([run], TRUTH)
    assert found.texts["a"].slope == pytest.approx(1, rel=1e-4)
    assert found.texts["a"].vocabulary_gain == pytest.approx(TYPICAL_GAIN, rel=1e-4)
    assert found.predict(run) == pytest.approx(run.loss, rel=1e-4)


def test_the_unit_of_the_loss_is_free() -> None:
    in_bits, in_nats = observations(), [replace(run, loss=run.loss * math.log(2)) for run in observations()]
    first, second = fit_texts(in_bits, TRUTH), fit_texts(in_nats, TRUTH)
    for text, numbers in second.texts.items():
        assert numbers.slope == pytest.approx(first.texts[text].slope)
    assert [second.predict(run) for run in in_nats] == pytest.approx(
        [math.log(2) * first.predict(run) for run in in_bits]
    )


def test_the_law_is_the_best_fit_to_the_runs_of_the_study() -> None:
    """No constants have a smaller error on docs/law_runs.csv than those of the fit, up to their digits."""
    with (Path(__file__).parents[2] / "docs" / "law_runs.csv").open(encoding="utf-8") as file:
        runs = [
            Observation(
                row["text"], int(row["vocab_size"]),
                ModelSize.of(int(row["hidden_size"]), int(row["num_hidden_layers"]), int(row["vocab_size"])),
                float(row["text_bytes"]), float(row["epochs"]), float(row["bits_per_byte"]),
            )
            for row in csv.DictReader(file)
        ]  # fmt: skip

    def error(found: Fit) -> float:
        return math.sqrt(sum(math.log(found.predict(run) / run.loss) ** 2 for run in runs) / len(runs))

    assert error(fit_texts(runs, LAW)) == pytest.approx(error(fit(runs)), rel=0.01)


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="11 runs are too few"):
        fit(observations()[:11])


@pytest.mark.parametrize("law", [LAW, TRUTH])
def test_more_text_helps_and_repeating_it_helps_less(law: ScalingLaw) -> None:
    fresh = [law.relative_loss(of_layers(1e6), text_bytes) for text_bytes in (1e5, 3e5, 1e6, 3e6, 1e7, 1e9)]
    assert fresh == sorted(fresh, reverse=True)
    for epochs in (1.5, 3, 10, 100):
        assert law.relative_loss(of_layers(1e6), 3e6, epochs) > law.relative_loss(of_layers(1e6), 3e6)
    assert law.relative_loss(of_layers(1e6), 3e6, 1.0) == pytest.approx(law.relative_loss(of_layers(1e6), 3e6, 0.0))


@pytest.mark.parametrize("law", [LAW, TRUTH])
def test_a_larger_model_is_better_until_it_over_fits(law: ScalingLaw) -> None:
    read_once = [law.relative_loss(of_layers(size), 1e7) for size in (1e5, 1e6, 1e7, 1e8)]
    assert read_once == sorted(read_once, reverse=True)
    assert law.relative_loss(of_layers(1e8), 1e7, 500) > law.relative_loss(of_layers(1e6), 1e7, 500)
