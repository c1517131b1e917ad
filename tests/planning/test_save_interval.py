"""Laws of the interval between checkpoints: it is the best one, also in a simulation of failures."""

import math
import random

import pytest

from minigpt.planning.save_interval import RESTART_S, SaveInterval


def lost_share(every_s: float, save_s: float, failure_s: float) -> float:
    """The share of the time that is not spent on steps that stay, simulated over many failures."""
    generator = random.Random(0)
    clock = useful = 0.0
    for _ in range(4000):
        until_failure = generator.expovariate(1 / failure_s)
        useful += every_s * math.floor(until_failure / (every_s + save_s))
        clock += until_failure + RESTART_S
    return 1 - useful / clock


@pytest.mark.parametrize(("save_s", "failure_s"), [(8.5, 99 * 3600), (60, 4 * 3600), (2, 3600)])
def test_no_other_interval_loses_less_in_a_simulation(save_s: float, failure_s: float) -> None:
    best = SaveInterval(0, save_s, failure_s, step_s=0.1)
    found = lost_share(best.save_steps * best.step_s, save_s, failure_s)
    for factor in (0.3, 0.6, 1.7, 3):
        assert found < lost_share(factor * best.save_steps * best.step_s, save_s, failure_s)
    assert best.saving_share + best.lost_share == pytest.approx(found, rel=0.1)


def test_a_run_that_fails_more_often_saves_more_often() -> None:
    steps = [SaveInterval(0, 10, hours * 3600, 0.5).save_steps for hours in (1, 10, 100)]
    assert steps == sorted(steps)
    assert SaveInterval(0, 1000, 1, 1).save_steps == 1
