"""Differences between arms over paired seeds, and what may be concluded from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from lwkd.program.errors import require


class Difference(NamedTuple):
    """One arm minus another over the same seeds.

    ``mean``, standard deviation ``sd``, standard error ``error``; ``low`` and ``high`` of the 95 % interval of the
    mean (Student's t); ``p`` of the paired t-test, two-sided; ``wins`` of ``n`` seeds in which the first is better.
    """

    mean: float
    sd: float
    error: float
    low: float
    high: float
    p: float
    wins: int
    n: int


def paired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """The difference of two arms whose scores stand in the order of the same seeds, two at least.

    >>> difference = paired([3.0, 4.0, 5.0], [2.0, 2.0, 2.0])
    >>> difference.mean, difference.sd, difference.wins
    (2.0, 1.0, 3)
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean, sd, n = statistics.fmean(differences), statistics.stdev(differences), len(differences)
    wins = sum(difference > 0 for difference in differences)
    if sd == 0:  # the same run twice, or a difference without any chance in it
        return Difference(mean, 0.0, 0.0, mean, mean, 1.0 if mean == 0 else 0.0, wins, n)
    test = require("scipy.stats").ttest_rel(first, second)
    low, high = test.confidence_interval(0.95)
    return Difference(mean, sd, sd / math.sqrt(n), float(low), float(high), float(test.pvalue), wins, n)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for how many there are: any at most 0.05 is an error in at most 5 % of such families.

    Source: Holm 1979.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = least
    return adjusted


def seeds_for(sd: float, difference: float) -> int:
    """Seeds with which a paired difference is found in four cases of five (5 % level): (2.8 · sd / difference)².

    >>> seeds_for(1.0, 0.5)
    32
    """
    return math.ceil((2.8 * sd / difference) ** 2)
