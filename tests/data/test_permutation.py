"""Laws of the shuffled order: it visits everything once, and no statistic tells it from a table that is shuffled."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from minigpt.data.permutation import permuted, round_keys


def order(size: int, *seeds: int) -> list[int]:
    keys = round_keys(seeds)
    return [permuted(place, size, keys) for place in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 1000, 1025, 65_537])
def test_every_number_is_visited_once(size: int) -> None:
    for epoch in range(3):
        assert sorted(order(size, 1, epoch)) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_order_of_a_few_numbers_is_equally_likely(size: int) -> None:
    orders, expected = math.factorial(size), 60
    counts = Counter(tuple(order(size, seed)) for seed in range(expected * orders))
    assert len(counts) == orders
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < (orders - 1) + 5 * math.sqrt(2 * (orders - 1))  # its mean and standard deviation


@pytest.mark.parametrize("size", [1000, 1024, 4099])
def test_the_statistics_of_long_orders_are_those_of_shuffled_ones(size: int) -> None:
    """In a random order: one fixed point, half of the neighbours ascend, and places and epochs are not correlated."""
    epochs = [order(size, 7, epoch) for epoch in range(60)]
    fixed = [sum(place == number for place, number in enumerate(epoch)) for epoch in epochs]
    ascents = [sum(first < second for first, second in pairwise(epoch)) for epoch in epochs]
    followers = [sum(second - first == 1 for first, second in pairwise(epoch)) for epoch in epochs]
    assert np.mean(fixed) == pytest.approx(1, abs=5 / math.sqrt(60))
    assert np.mean(followers) == pytest.approx(1, abs=5 / math.sqrt(60))
    assert np.mean(ascents) == pytest.approx(size / 2, abs=5 * math.sqrt(size / 12 / 60))
    table = np.array(epochs)
    correlations = [np.corrcoef(first, second)[0, 1] for first, second in pairwise([np.arange(size), *table])]
    assert np.abs(correlations).max() < 5 / math.sqrt(size)
    halves = table[:, : size // 2].mean(axis=1) / size
    assert np.abs(halves - 0.5).max() < 5 / math.sqrt(12 * size)


def test_neighbours_of_a_huge_order_are_far_apart() -> None:
    size, keys = 10**11, round_keys([1, 2])
    numbers = np.array([permuted(place, size, keys) for place in range(5000)], dtype=np.float64) / size
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 5 / math.sqrt(5000)
    counts, _ = np.histogram(numbers, bins=50, range=(0, 1))
    assert ((counts - 100) ** 2 / 100).sum() < 49 + 5 * math.sqrt(2 * 49)
