"""Laws of the sequential t-test: few false alarms at all looks together, and it settles on real differences."""

import math

import numpy as np
import pytest

from minigpt.experiments.paired_test import ERROR_RATE, PRIOR_VARIANCE, confidence_sequence, pairs_until_finite


def share_that_rejects(mean: float, looks: int, sequences: int = 400) -> float:
    """The share of sequences of normal differences in which some interval leaves out zero."""
    differences = np.random.default_rng(0).normal(mean, 1.0, (sequences, looks))
    return float(
        np.mean(
            [
                any(0 not in confidence_sequence(row[:count]) for count in range(1, looks + 1))
                for row in differences.tolist()
            ]
        )
    )


def test_looking_after_every_pair_gives_no_more_false_alarms_than_promised() -> None:
    rate = share_that_rejects(0.0, looks=40)
    assert 0 < rate <= ERROR_RATE  # it is a real test, not one that never rejects


def test_a_difference_of_two_standard_deviations_is_found_within_twenty_pairs() -> None:
    assert share_that_rejects(2.0, looks=20) > 0.99


@pytest.mark.parametrize("true_mean", [-3.0, 0.0, 0.4])
def test_the_interval_holds_the_true_mean(true_mean: float) -> None:
    differences = np.random.default_rng(1).normal(true_mean, 0.5, (400, 30)).tolist()
    missed = [any(true_mean not in confidence_sequence(row[:count]) for count in range(2, 31)) for row in differences]
    assert np.mean(missed) <= ERROR_RATE


def test_the_interval_is_that_of_the_integrated_likelihood() -> None:
    """At the edge of the interval the Bayes factor, integrated numerically over mean and scale, is 1 / error rate."""
    differences = np.array([0.9, 1.3, 0.2, 1.9, 0.7, 1.1])
    edge = confidence_sequence(differences).low
    shifted = differences - edge  # so that the hypothesis at the edge is a mean of zero
    log_sigma = np.linspace(-3, 4, 1201)
    sigma = np.exp(log_sigma)[:, None]  # the Haar prior d sigma / sigma is uniform in log sigma
    effect = np.linspace(-14, 14, 2801)[None, :]
    prior = np.exp(-(effect**2) / (2 * PRIOR_VARIANCE)) / math.sqrt(2 * math.pi * PRIOR_VARIANCE)

    def likelihood(mean: np.ndarray | float) -> np.ndarray:
        squares = sum((value - mean) ** 2 for value in shifted)
        return np.asarray(sigma ** -len(shifted) * np.exp(-squares / (2 * sigma**2)))

    no_effect = likelihood(0.0).sum()
    any_effect = (likelihood(effect * sigma) * prior).sum() * (effect[0, 1] - effect[0, 0])
    assert any_effect / no_effect == pytest.approx(1 / ERROR_RATE, rel=1e-3)


def test_the_unit_does_not_matter() -> None:
    differences = np.random.default_rng(2).normal(0.3, 1.0, 12)
    interval, scaled = confidence_sequence(differences), confidence_sequence(1000 * differences)
    assert (scaled.low, scaled.mean, scaled.high) == pytest.approx(
        (1000 * interval.low, 1000 * interval.mean, 1000 * interval.high)
    )


def test_the_interval_is_infinite_while_no_result_could_be_convincing() -> None:
    enough = pairs_until_finite()
    assert math.isinf(confidence_sequence([1.0] * (enough - 1)).high)
    assert math.isfinite(confidence_sequence([1.0] * enough).high)
