"""A sequential t-test for paired differences: look after every pair, and stop when the question is settled.

An ordinary 95 % interval is wrong for someone who looks after every pair: sooner or later it misses the truth by
chance. The interval here holds at all looks together: it fails at any of them with a probability of at most 5 %. It
inverts a Bayes factor, which compares "the differences have this mean" with "their mean is off by a normally
distributed number of standard deviations". By Ville's inequality such a factor exceeds 20 with a probability of at
most 1/20, whenever one stops. Differences are taken as normally distributed, with unknown mean and variance.
Sources: Rouder et al. 2009 (https://doi.org/10.3758/PBR.16.2.225) for the Bayes factor of a t-statistic; Hendriksen,
de Heide and Grünwald 2021 (https://arxiv.org/abs/1807.09077) and Wang and Ramdas 2024
(https://arxiv.org/abs/2310.03722) for why one may stop at any time.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

ERROR_RATE = 0.05
PRIOR_VARIANCE = 4.0  # of the mean difference, in variances of one difference; decides only how fast a test settles


@dataclass(frozen=True)
class Interval:
    """The mean of the differences so far, and the interval that holds their true mean."""

    mean: float
    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def confidence_sequence(differences: Sequence[float], error_rate: float = ERROR_RATE) -> Interval:
    """The interval after these pairs. It is infinite after the first one, or while there are too few."""
    count = len(differences)
    mean = statistics.fmean(differences)
    if count < 2:
        return Interval(mean, -math.inf, math.inf)
    # The factor is sqrt(1 / (1 + ng)) ((1 + t²/v) / (1 + t²/(v (1 + ng)))) ** ((v + 1) / 2) for n pairs, v = n - 1 and
    # a prior variance of g. Here it is solved for the t² where it reaches 1 / error_rate.
    freedom, shrinkage = count - 1, 1 + count * PRIOR_VARIANCE
    ratio = (math.sqrt(shrinkage) / error_rate) ** (2 / (freedom + 1))
    if ratio >= shrinkage:  # no t, however large, is enough
        return Interval(mean, -math.inf, math.inf)
    t = math.sqrt(freedom * (ratio - 1) / (1 - ratio / shrinkage))
    margin = t * statistics.stdev(differences) / math.sqrt(count)
    return Interval(mean, mean - margin, mean + margin)


@cache
def pairs_until_finite(error_rate: float = ERROR_RATE) -> int:
    """The smallest number of pairs whose interval can be finite."""
    count = 2
    while math.isinf(confidence_sequence([0.0] * count, error_rate).high):
        count += 1
    return count
