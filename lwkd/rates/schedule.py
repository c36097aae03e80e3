"""When a measurement is due, and what measuring has cost beside training."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lwkd.rates.device import Clock, HostClock, capturing, clock_of
from lwkd.rates.distributed import summed, world_size

WARM_UP = 1
"""Measurements whose times say nothing yet: memory is fetched, libraries choose their algorithms."""

CALIBRATION = 4
"""Measurements in a row, the warm-up among them, that find out what one costs."""

MARGIN = 1.15
"""By how much longer than calibrated a measurement may take before the budget is exceeded."""

REMEMBERED = 512
"""Updates from whose durations the median is taken."""


@dataclass
class _Update:
    """An update whose books are open: marks of the clock, and whether a measurement was made (None: not known yet)."""

    begin: Any | None
    end: Any
    measuring: list[tuple[Any, Any]]
    measured: bool | None


class Schedule:
    """Every so many updates, or as often as a budget allows.

    With a budget every update is measured at first, until :data:`CALIBRATION` of them are known. Then the interval is
    fixed at ``every = ceil(MARGIN · measuring / (budget · update))`` (mean of the one, median of the other, the same on
    all ranks), and the next measurement waits until those of the calibration and it itself are paid for. What the first
    one took longer than the others is a start-up cost, like the first update's own, and is not paid off.

    Time is that of the host, or on a GPU that between two events on its stream. Those are read when they have passed,
    so that the books of an update may be closed after the next has begun, and a calibration then takes one measurement
    more; nothing is timed while a CUDA graph is captured. Several ranks wait for each other once, to fix the interval.

    Args:
        every: updates from one measurement to the next.
        budget: share of an update's time that measuring may take on average, in (0, 1]; None keeps ``every``.
    """

    def __init__(self, every: int, budget: float | None = None) -> None:
        self.every, self.budget = every, budget
        self.first = 0  # update of the first measurement, or of the calibration
        self.calibrated = budget is None
        self.clock: Clock = HostClock()
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._spent, self._updates = 0.0, 0
        self._plain: deque[float] = deque(maxlen=REMEMBERED)
        self._costs: list[float] = []
        self._last: Any | None = None  # end of the update before
        self._measuring: list[tuple[Any, Any]] = []
        self._open: deque[_Update] = deque()

    def keep_time_on(self, device: torch.device) -> None:
        """From now on the nets are on this device."""
        clock = clock_of(device)
        if clock.device != self.clock.device:
            self.clock = clock
            self._restart_clock()

    def due(self, update: int) -> bool:
        """Whether this update (counted from 0) is measured."""
        if not self.calibrated:
            return update >= self.first
        return update >= self.first and (update - self.first) % self.every == 0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """The time spent inside counts as measuring."""
        if capturing():
            yield
            return
        begin = self.clock.mark()
        try:
            yield
        finally:
            self._measuring.append((begin, self.clock.mark()))

    def end_update(self, update: int, measured: bool | None) -> None:
        """Close the books of an update; at the end of the calibration, fix the interval (on all ranks at once).

        Args:
            update: its number.
            measured: whether a measurement was made, on whichever rank; None where :meth:`arrived` will tell. Looking
                for a pass and finding none takes time too, yet says nothing about the cost of a measurement.
        """
        if capturing():
            self._last = None  # what is captured runs later
            return
        now = self.clock.mark()
        self._open.append(_Update(self._last, now, self._measuring, measured))
        self._last, self._measuring = now, []
        self._close()
        # Here, where all ranks come by, and not where the last cost becomes known: that may be one rank's reading.
        if not self.calibrated and len(self._costs) >= CALIBRATION:
            self._calibrate(update)

    def arrived(self, measured: bool) -> None:
        """Whether a measurement was made before the update that ended without knowing."""
        for book in self._open:
            # Long passed; yet ranks that close their books at different times would calibrate at different updates.
            self.clock.wait(book.end)
            if book.measured is None:
                book.measured = measured
                break
        self._close()

    def _close(self) -> None:
        while self._open and self._open[0].measured is not None and self.clock.passed(self._open[0].end):
            book = self._open.popleft()
            cost = sum(self.clock.between(begin, end) for begin, end in book.measuring)
            if book.begin is not None:
                self._plain.append(self.clock.between(book.begin, book.end) - cost)
                self._spent += cost
                self._updates += 1
            if book.measured and not self.calibrated:
                self._costs.append(cost)

    def _calibrate(self, update: int) -> None:
        assert self.budget is not None
        cost, plain = statistics.fmean(self._costs[WARM_UP:CALIBRATION]), statistics.median(self._plain)
        if world_size() > 1:
            cost, plain = summed(torch.tensor([cost, plain], dtype=torch.float64, device=self.clock.device)).tolist()
        pays = MARGIN * cost / (self.budget * plain)  # updates that pay for one measurement
        made = len(self._costs) + sum(book.measured is not False for book in self._open)
        self.every = max(1, math.ceil(pays))
        self.first, self.calibrated = update + self.every + math.ceil(made * pays), True
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

    def __getstate__(self) -> dict[str, Any]:
        """A copy keeps what is known; marks of a clock that runs elsewhere mean nothing to it."""
        return {**self.__dict__, "_last": None, "_measuring": [], "_open": deque()}
