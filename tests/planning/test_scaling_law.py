"""Laws of the fitted loss: the fit finds the law that made the data and predicts what it has not seen."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minigpt.planning.scaling_law import LAW, Fit, ModelSize, Observation, ScalingLaw, fit, fit_texts

TRUTH = ScalingLaw(0.08, 0.35, 0.4, 0.05, 0.5, 6.0, 0.008)
DIFFICULTY = {("a", 1024): 0.4, ("a", 4096): 0.3, ("b", 1024): 0.6, ("c", 4096): 0.5}
SLOPE = {"a": 1.4, "b": 0.6, "c": 1.1}
TEXT_TOKENS = {"a": 3e5, "b": 2e6, "c": 1e9}


def of_layers(parameters: float) -> ModelSize:
    """A model with so many weights in layers, and embeddings of a typical size."""
    return ModelSize(parameters, 1000 * parameters**0.5)


def true_loss(text: str, vocab_size: int, size: ModelSize, tokens: float) -> float:
    relative = TRUTH.relative_loss(size, tokens, tokens / TEXT_TOKENS[text], SLOPE[text])
    return DIFFICULTY[text, vocab_size] * relative


def observations(noise: float = 0.0) -> list[Observation]:
    """Runs of four sizes and three lengths, on three texts, one with two vocabularies, that follow `TRUTH`."""
    generator = np.random.default_rng(0)
    return [
        Observation(
            text, vocab_size, size, tokens, tokens / TEXT_TOKENS[text],
            true_loss(text, vocab_size, size, tokens) * math.exp(noise * generator.normal()),
        )
        for text, vocab_size in DIFFICULTY
        for size in map(of_layers, (1e5, 4e5, 1.8e6, 5e6))
        for tokens in (2e5, 8e5, 3e6)
    ]  # fmt: skip


def test_the_prediction_is_the_formula() -> None:
    """Written out here for a text of 2 million tokens that is read three times."""
    read = 2 * (1 + 6 * (1 - math.exp(-2 / 6)))
    over_fitting = 0.008 * 2 * (0.3 / 2) ** 2
    expected = 1 + 0.08 * 0.5**-0.35 + 1.7 * 0.4 * (read + 0.05) ** -0.5 + over_fitting
    assert TRUTH.relative_loss(ModelSize(5e5, 3e5), 6e6, 3.0, slope=1.7) == pytest.approx(expected)


def test_the_fit_predicts_what_made_the_data() -> None:
    found = fit(observations())
    for run in observations():
        assert found.predict(run) == pytest.approx(run.loss, rel=5e-3)
    steep, flat = found.slope["a"], found.slope["b"]
    assert steep / flat == pytest.approx(SLOPE["a"] / SLOPE["b"], rel=0.1)


def test_a_larger_model_with_more_text_is_predicted_within_the_noise() -> None:
    found = fit(observations(noise=0.005))
    for text, vocab_size in DIFFICULTY:
        expected = true_loss(text, vocab_size, of_layers(2e7), 1e7)
        larger = Observation(text, vocab_size, of_layers(2e7), 1e7, 1e7 / TEXT_TOKENS[text], expected)
        if larger.epochs < 1:
            assert found.predict(larger) == pytest.approx(expected, rel=0.03)


def test_two_runs_tell_the_slope_of_a_text_where_the_law_is_known() -> None:
    size, lengths = of_layers(4e5), (2e5, 8e5)
    runs = [
        Observation("a", 1024, size, tokens, tokens / TEXT_TOKENS["a"], true_loss("a", 1024, size, tokens))
        for tokens in lengths
    ]
    found = fit_texts(runs, TRUTH)
    assert found.law == TRUTH
    assert found.slope["a"] == pytest.approx(SLOPE["a"], rel=0.02)
    expected = true_loss("a", 1024, of_layers(1.8e6), 3e6)
    larger = Observation("a", 1024, of_layers(1.8e6), 3e6, 3e6 / TEXT_TOKENS["a"], expected)
    assert found.predict(larger) == pytest.approx(expected, rel=0.01)


def test_one_run_leaves_the_slope_of_a_typical_text() -> None:
    (run,) = observations()[:1]
    assert fit_texts([run], TRUTH).slope["a"] == pytest.approx(1, rel=1e-4)
    assert fit_texts([run], TRUTH).predict(run) == pytest.approx(run.loss, rel=1e-4)


def test_the_unit_of_the_loss_is_free() -> None:
    in_bits, in_nats = observations(), [replace(run, loss=run.loss * math.log(2)) for run in observations()]
    first, second = fit_texts(in_bits, TRUTH), fit_texts(in_nats, TRUTH)
    assert second.slope == pytest.approx(first.slope)
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
                int(row["tokens"]), float(row["epochs"]), float(row["bits_per_byte"]),
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
    fresh = [law.relative_loss(of_layers(1e6), tokens) for tokens in (1e5, 3e5, 1e6, 3e6, 1e7, 1e9)]
    assert fresh == sorted(fresh, reverse=True)
    for epochs in (1.5, 3, 10, 100):
        assert law.relative_loss(of_layers(1e6), 3e6, epochs) > law.relative_loss(of_layers(1e6), 3e6)
    assert law.relative_loss(of_layers(1e6), 3e6, 1.0) == pytest.approx(law.relative_loss(of_layers(1e6), 3e6, 0.0))


@pytest.mark.parametrize("law", [LAW, TRUTH])
def test_a_larger_model_is_better_until_it_over_fits(law: ScalingLaw) -> None:
    read_once = [law.relative_loss(of_layers(size), 1e7) for size in (1e5, 1e6, 1e7, 1e8)]
    assert read_once == sorted(read_once, reverse=True)
    assert law.relative_loss(of_layers(1e8), 1e7, 500) > law.relative_loss(of_layers(1e6), 1e7, 500)
