"""What a signal adds on average at any interval, and which interval a budget pays for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

INTERVALS = (1, 2, 5, 10, 15, 20, 30, 50, 100)


def mean_overhead(due: float, not_due: float, every: int) -> float:
    """Share of a step that is added on average, when one update in so many is measured.

    >>> mean_overhead(due=0.1, not_due=0.0, every=10)
    0.01
    """
    return (due + (every - 1) * not_due) / every


def shortest_interval(due: float, not_due: float, budget: float) -> int | None:
    """The least interval at which no more than the budget is added; None where even a signal at rest adds more.

    >>> shortest_interval(due=0.1, not_due=0.0, budget=0.03), shortest_interval(0.1, 0.05, 0.03)
    (4, None)
    """
    if due <= budget:
        return 1
    if not_due >= budget:
        return None
    # Rounding must not ask for one update more than an interval that fits exactly.
    return math.ceil((due - not_due) / (budget - not_due) - 1e-9)


class Recommendation(NamedTuple):
    """How often and on how many rows to measure, and what that adds."""

    every: int
    samples: int
    overhead: float


def recommend(due: Mapping[int, float], not_due: float, budget: float, usual: int) -> Recommendation | None:
    """The most rows that the budget pays for at the usual interval or oftener; else those with the shortest interval.

    Args:
        due: what a measured update adds, by rows.
        not_due: what an update adds that is not measured.
        budget: share of a step that may be added on average.
        usual: the signal's own interval.

    Returns:
        None where no interval fits.

    >>> recommend({8: 0.1, 16: 0.2, 32: 0.4}, not_due=0.0, budget=0.03, usual=10)
    Recommendation(every=7, samples=16, overhead=0.0285...)
    """
    fitting = {rows: every for rows, cost in due.items() if (every := shortest_interval(cost, not_due, budget))}
    if not fitting:
        return None
    at_once = [rows for rows, every in fitting.items() if every <= usual]
    rows = max(at_once) if at_once else min(fitting, key=lambda rows: (fitting[rows], -rows))
    return Recommendation(fitting[rows], rows, mean_overhead(due[rows], not_due, fitting[rows]))
