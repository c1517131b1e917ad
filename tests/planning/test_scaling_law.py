"""Laws of the fitted loss: the fit finds the law that made the data and predicts what it has not seen."""

import math
from dataclasses import replace

import numpy as np
import pytest

from minigpt.planning.scaling_law import LAW, Observation, ScalingLaw, fit
from minigpt.planning.text_profile import Vocabulary

TRUTH = ScalingLaw(0.5, 0.04, 0.35, 0.2, 0.5, 6.0, 0.004, (0.5, 0.3, 0.2))
TEXTS = [Vocabulary(1024, 2.5, bits) for bits in ((3.2, 2.4, 2.0), (2.6, 2.1, 1.9), (3.0, 1.9, 1.5), (2.2, 2.0, 1.8))]
TEXT_TOKENS = (3e5, 1e6, 4e6, 1e9)


def observations(noise: float = 0.0) -> list[Observation]:
    """Runs of four sizes and four lengths on four texts, that follow `TRUTH` up to relative noise."""
    generator = np.random.default_rng(0)
    runs = [
        Observation(text, layer_parameters, tokens, tokens / text_tokens, 1.0)
        for text, text_tokens in zip(TEXTS, TEXT_TOKENS, strict=True)
        for layer_parameters in (1e5, 4e5, 1.8e6, 5e6)
        for tokens in (2e5, 5e5, 1.2e6, 3e6)
    ]
    return [replace(run, bits_per_byte=predict(TRUTH, run) * math.exp(noise * generator.normal())) for run in runs]


def predict(law: ScalingLaw, run: Observation) -> float:
    return law.bits_per_byte(run.vocabulary, run.layer_parameters, run.tokens, run.epochs)


def test_the_prediction_is_the_formula() -> None:
    """Written out here for a text of 2 million tokens that is read three times."""
    read = 2 * (1 + 6 * (1 - math.exp(-2 / 6)))
    expected = 0.5 + 0.04 * 0.5**-0.35 + 0.2 * read**-0.5 + 0.004 * 2 * math.sqrt(0.5 / 2)
    difficulty = 3.2**0.5 * 2.4**0.3 * 2.0**0.2
    assert TRUTH.bits_per_byte(TEXTS[0], 5e5, 6e6, 3.0) == pytest.approx(difficulty * expected)


def test_the_fit_predicts_what_made_the_data() -> None:
    found = fit(observations())
    for run in observations():
        assert predict(found, run) == pytest.approx(run.bits_per_byte, rel=2e-3)


def test_a_larger_model_with_more_text_is_predicted_within_the_noise() -> None:
    found = fit(observations(noise=0.005))
    for text in TEXTS:
        larger = Observation(text, 2e7, 1e7, 0.0, 1.0)
        assert predict(found, larger) == pytest.approx(predict(TRUTH, larger), rel=0.03)


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="11 runs are too few"):
        fit(observations()[:11])


@pytest.mark.parametrize("law", [LAW, TRUTH])
def test_more_text_helps_and_repeating_it_helps_less(law: ScalingLaw) -> None:
    text = TEXTS[0]
    fresh = [law.bits_per_byte(text, 1e6, tokens) for tokens in (1e5, 3e5, 1e6, 3e6, 1e7, 1e9)]
    assert fresh == sorted(fresh, reverse=True)
    for epochs in (1.5, 3, 10, 100):
        assert law.bits_per_byte(text, 1e6, 3e6, epochs) > law.bits_per_byte(text, 1e6, 3e6)
    assert law.bits_per_byte(text, 1e6, 3e6, 1.0) == pytest.approx(law.bits_per_byte(text, 1e6, 3e6, 0.0))


@pytest.mark.parametrize("law", [LAW, TRUTH])
def test_a_larger_model_is_better_until_it_over_fits(law: ScalingLaw) -> None:
    text, sizes = TEXTS[0], (1e5, 1e6, 1e7, 1e8)
    read_once = [law.bits_per_byte(text, size, 1e7) for size in sizes]
    assert read_once == sorted(read_once, reverse=True)
    assert law.bits_per_byte(text, 1e8, 1e7, 500) > law.bits_per_byte(text, 1e6, 1e7, 500)
