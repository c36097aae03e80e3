"""When a measurement is due, and what measuring has cost beside training."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

WARM_UP = 1
"""Measurements whose times say nothing yet: memory is fetched, libraries choose their algorithms."""

CALIBRATION = 4
"""Measurements in a row, the warm-up among them, that find out what one costs."""

MARGIN = 1.15
"""By how much longer than calibrated a measurement may take before the budget is exceeded."""

REMEMBERED = 512
"""Updates from whose durations the median is taken."""


class Schedule:
    """Every so many updates, or as often as a budget allows.

    With a budget every update is measured at first, :data:`CALIBRATION` of them. Then the interval is fixed at
    ``every = ceil(MARGIN · measuring / (budget · update))`` (mean of the one, median of the other, the same on all
    ranks), and the next measurement waits until those of the calibration and it itself are paid for. What the first
    one took longer than the others is a start-up cost, like the first update's own, and is not paid off.

    Args:
        every: updates from one measurement to the next.
        budget: share of an update's time that measuring may take on average, in (0, 1]; None keeps ``every``.
    """

    def __init__(self, every: int, budget: float | None = None) -> None:
        self.every, self.budget = every, budget
        self.first = 0  # update of the first measurement, or of the calibration
        self.calibrated = budget is None
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._clock: float | None = None
        self._measuring, self._spent, self._updates = 0.0, 0.0, 0
        self._plain: deque[float] = deque(maxlen=REMEMBERED)
        self._costs: list[float] = []

    def due(self, update: int) -> bool:
        """Whether this update (counted from 0) is measured."""
        if not self.calibrated:
            return update >= self.first
        return update >= self.first and (update - self.first) % self.every == 0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """The time spent inside counts as measuring."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._measuring += time.perf_counter() - begin

    def end_update(self, update: int, measured: bool) -> None:
        """Close the books of an update; at the end of the calibration, fix the interval (on all ranks at once).

        Args:
            update: its number.
            measured: whether a measurement was made, on whichever rank. Looking for a pass and finding none takes time
                too, yet says nothing about the cost of a measurement.
        """
        now = time.perf_counter()
        if self._clock is not None:
            self._plain.append(now - self._clock - self._measuring)
            self._spent += self._measuring
            self._updates += 1
        if measured and not self.calibrated:
            self._costs.append(self._measuring)
        self._clock, self._measuring = now, 0.0
        if len(self._costs) == CALIBRATION:
            self._calibrate(update)

    def _calibrate(self, update: int) -> None:
        assert self.budget is not None
        shared = torch.tensor(
            [statistics.fmean(self._costs[WARM_UP:]), statistics.median(self._plain)], dtype=torch.float64
        )
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(shared)
        cost, plain = shared.tolist()
        pays = MARGIN * cost / (self.budget * plain)  # updates that pay for one measurement
        self.every = max(1, math.ceil(pays))
        self.first, self.calibrated = update + self.every + math.ceil(CALIBRATION * pays), True
        self._costs = []

    def overhead(self) -> float:
        """Time spent measuring as a share of the time that the same updates took otherwise; 0 before the second.

        The mean measuring time of an update over the median duration of the last ones without it, so that a pause
        between two updates (validation, a checkpoint) does not flatter it. The first update, and those before a resume,
        do not count.
        """
        return self._spent / (self._updates * statistics.median(self._plain)) if self._plain else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"every": self.every, "first": self.first, "calibrated": self.calibrated, "budget": self.budget}

    def load_state_dict(self, state: dict[str, Any], update: int) -> None:
        """Continue at this update: with the saved interval where that came from the same budget, else with one's own.

        A calibration that was under way starts again; ``every`` without a budget is a setting, and stays as it is set.
        """
        if self.budget is not None:
            self.calibrated = state["calibrated"] and state["budget"] == self.budget
            self.every = state["every"] if self.calibrated else self.every
            self.first = state["first"] if self.calibrated else update
        self._restart_clock()
