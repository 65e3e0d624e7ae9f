"""Give a median its interval without assuming a distribution."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

LEAST_VALUES = 6
"""Five values give 1 - 2 * 0.5^5 = 93.75 % at best."""


class Interval(NamedTuple):
    """Hold a median and its 95 % interval."""

    median: float
    low: float
    high: float


def median_interval(values: Sequence[float]) -> Interval:
    """Return the median and the 95 % interval of the sign test.

    The true median lies between the k-th smallest and the k-th largest of n values with probability
    1 - 2 P(Binomial(n, 1/2) < k); k is the largest with at least 95 %.
    Raises ValueError for fewer than six values.
    """
    count = len(values)
    if count < LEAST_VALUES:
        raise ValueError(f"{count} values give no 95 % interval: at least {LEAST_VALUES} do.")
    ordered = sorted(values)
    k, tail_outcomes = 0, 1  # outcomes with at most k heads, of 2^n
    while 40 * tail_outcomes <= 2**count:
        k += 1
        tail_outcomes += math.comb(count, k)
    return Interval(statistics.median(ordered), ordered[k - 1], ordered[count - k])
