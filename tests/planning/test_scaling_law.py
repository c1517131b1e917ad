"""Laws of the fitted loss: it finds the law that made the data, and predicts what it has not seen."""

import numpy as np
import pytest

from minigpt.planning.scaling_law import Observation, ScalingLaw, TextConstants, fit

LAW = ScalingLaw(0.35, 0.6, {"a": TextConstants(1.2, 0.3, 0.8), "b": TextConstants(0.7, 0.2, 0.5)})


def observations(noise: float = 0.0) -> list[Observation]:
    """Runs of four sizes and three lengths on both texts, that follow `LAW` up to relative noise."""
    generator = np.random.default_rng(0)
    return [
        Observation(
            text, parameters, read, LAW.bits_per_byte(text, parameters, read) * (1 + noise * generator.normal())
        )
        for text in LAW.texts
        for parameters in (1e5, 4e5, 1.8e6, 5e6)
        for read in (5e5, 2e6, 6e6)
    ]


def test_the_fit_finds_the_law_that_made_the_data() -> None:
    found = fit(observations())
    assert (found.alpha, found.beta) == pytest.approx((LAW.alpha, LAW.beta))
    for text, constants in LAW.texts.items():
        assert vars(found.texts[text]) == pytest.approx(vars(constants), rel=1e-6)


def test_a_larger_model_with_more_text_is_predicted_within_the_noise() -> None:
    found = fit(observations(noise=0.005))
    for text in LAW.texts:
        assert found.bits_per_byte(text, 2e7, 2e7) == pytest.approx(LAW.bits_per_byte(text, 2e7, 2e7), rel=0.03)


def test_no_constant_is_below_zero() -> None:
    """Data without an effect of the size must not give a negative one."""
    flat = [Observation("a", size, read, 1 + (read / 1e6) ** -0.5) for size in (1e5, 1e6) for read in (1e6, 3e6, 9e6)]
    constants = fit(flat).texts["a"]
    assert min(vars(constants).values()) >= 0
    assert constants.capacity == pytest.approx(0, abs=1e-6)


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="a has 3 runs"):
        fit([observation for observation in observations() if observation.text == "a"][:3])
