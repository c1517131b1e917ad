"""Laws of the fitted loss: the fit finds the law that made the data and predicts what it has not seen."""

import math
from dataclasses import replace

import numpy as np
import pytest

from minigpt.planning.scaling_law import LAW, ModelSize, Observation, ScalingLaw, fit, log_ratio

TRUTH = ScalingLaw(0.5, 0.08, 0.35, 0.4, 0.5, 6.0, 0.008)
DIFFICULTY = {"a": 0.4, "b": 0.6, "c": 0.5}
TEXT_TOKENS = {"a": 3e5, "b": 2e6, "c": 1e9}


def of_layers(parameters: float) -> ModelSize:
    """A model with so many weights in layers, and embeddings of a typical size."""
    return ModelSize(parameters, 1000 * parameters**0.5)


def predict(law: ScalingLaw, run: Observation) -> float:
    return law.relative_loss(run.unigram_bits, run.size, run.tokens, run.epochs)


def observations(noise: float = 0.0) -> list[Observation]:
    """Runs of four sizes, three lengths and two vocabularies on three texts, that follow `TRUTH` up to noise."""
    generator = np.random.default_rng(0)
    runs = [
        Observation(text, unigram_bits, size, tokens, tokens / TEXT_TOKENS[text], 1.0)
        for text in DIFFICULTY
        for unigram_bits in (2.4, 3.1)
        for size in map(of_layers, (1e5, 4e5, 1.8e6, 5e6))
        for tokens in (2e5, 8e5, 3e6)
    ]
    return [
        replace(run, bits_per_byte=DIFFICULTY[run.text] * predict(TRUTH, run) * math.exp(noise * generator.normal()))
        for run in runs
    ]


def test_the_prediction_is_the_formula() -> None:
    """Written out here for a text of 2 million tokens that is read three times."""
    read = 2 * (1 + 6 * (1 - math.exp(-2 / 6)))
    expected = 1 + 0.08 * 0.5**-0.35 + 0.4 * read**-0.5 + 0.008 * 2 * ((0.5 + 0.3) / 2) ** 1.5
    assert TRUTH.relative_loss(3.2, ModelSize(5e5, 3e5), 6e6, 3.0) == pytest.approx(3.2**0.5 * expected)


def test_the_fit_predicts_what_made_the_data() -> None:
    law, difficulty = fit(observations())
    for run in observations():
        assert difficulty[run.text] * predict(law, run) == pytest.approx(run.bits_per_byte, rel=5e-3)


def test_a_larger_model_with_more_text_is_predicted_within_the_noise() -> None:
    law, difficulty = fit(observations(noise=0.005))
    for text in DIFFICULTY:
        larger = Observation(text, 2.4, of_layers(2e7), 1e7, 0.0, 1.0)
        expected = DIFFICULTY[text] * predict(TRUTH, larger)
        assert difficulty[text] * predict(law, larger) == pytest.approx(expected, rel=0.03)


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="11 runs are too few"):
        fit(observations()[:11])


@pytest.mark.parametrize("law", [LAW, TRUTH])
def test_more_text_helps_and_repeating_it_helps_less(law: ScalingLaw) -> None:
    fresh = [law.relative_loss(3.0, of_layers(1e6), tokens) for tokens in (1e5, 3e5, 1e6, 3e6, 1e7, 1e9)]
    assert fresh == sorted(fresh, reverse=True)
    for epochs in (1.5, 3, 10, 100):
        assert law.relative_loss(3.0, of_layers(1e6), 3e6, epochs) > law.relative_loss(3.0, of_layers(1e6), 3e6)
    assert law.relative_loss(3.0, of_layers(1e6), 3e6, 1.0) == pytest.approx(
        law.relative_loss(3.0, of_layers(1e6), 3e6, 0.0)
    )


@pytest.mark.parametrize("law", [LAW, TRUTH])
def test_a_larger_model_is_better_until_it_over_fits(law: ScalingLaw) -> None:
    read_once = [law.relative_loss(3.0, of_layers(size), 1e7) for size in (1e5, 1e6, 1e7, 1e8)]
    assert read_once == sorted(read_once, reverse=True)
    assert law.relative_loss(3.0, of_layers(1e8), 1e7, 500) > law.relative_loss(3.0, of_layers(1e6), 1e7, 500)


def test_the_ratio_of_two_losses_is_that_of_any_text_and_vocabulary() -> None:
    expected = math.log(
        LAW.relative_loss(2.3, of_layers(1e6), 4e6, 2.0) / LAW.relative_loss(2.3, of_layers(1e6), 1e6, 0.5)
    )
    assert log_ratio(of_layers(1e6), 1e6, 4e6, text_tokens=2e6) == pytest.approx(expected)
