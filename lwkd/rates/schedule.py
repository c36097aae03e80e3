"""When a measurement is due, and what share of the time measuring takes."""

from __future__ import annotations

import math
import statistics
import warnings
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from lwkd.rates.device import Clock, HostClock, capturing, clock_of
from lwkd.rates.distributed import Ranks

WARM_UP = 1
"""Measurements whose times are not used: memory is allocated and libraries choose their algorithms in them."""

CALIBRATION = 4
"""Measurements in a row, the warm-up among them, from which the cost of one is found."""

MARGIN = 1.15
"""A measurement may take this many times what it took in the calibration before the budget is exceeded."""

REMEMBERED = 512
"""Updates from whose durations the median is taken."""

EXPENSIVE, EXPENSIVE_AFTER = 0.1, 100
"""A default interval at which measuring takes more than this share of so many updates is warned of."""


@dataclass
class _Update:
    """Marks of the clock in an update, kept until they can be read.

    ``measuring`` holds begin and end of every measurement; ``measured`` is None while it is not known whether there
    was one.
    """

    begin: Any | None
    end: Any
    measuring: list[tuple[Any, Any]]
    measured: bool | None


class _Measuring:
    """Marks the begin and the end of a measurement, unless it is captured: what is captured runs later."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __enter__(self) -> None:
        self.begin = None if capturing() else self.schedule.clock.mark()

    def __exit__(self, *_: object) -> None:
        if self.begin is not None:
            self.schedule._measuring.append((self.begin, self.schedule.clock.mark()))


class Schedule:
    """Measures every so many updates, or as often as a budget allows.

    With a budget every update is measured at first, until the times of :data:`CALIBRATION` measurements are known. Then
    the interval is fixed on all ranks: ``every = ceil(MARGIN · measuring / (budget · update))``, from the mean
    time of a measurement and the median time of an update without it. The next measurement comes when the updates since
    have paid for it and for those of the calibration; what the first one took longer than the others is a start-up cost
    and is not counted.

    Time is that of the host, or on a GPU that between two events on its stream. Events are read when they have passed,
    which may be after the next update has begun, and a calibration then takes one measurement more. Nothing is timed
    while a CUDA graph is captured. Several ranks wait for each other once, to fix the interval.

    Args:
        every: updates from one measurement to the next.
        budget: share of an update's time that measuring may take on average, in (0, 1]; None keeps ``every``.
        chosen: whether the user has chosen one of both, who is then not warned of what measuring takes.

    Warns:
        UserWarning: nobody has chosen how often to measure, and it takes more than a tenth of the time: small nets and
            short steps pay most, on a GPU above all.
    """

    def __init__(self, every: int, budget: float | None = None, *, chosen: bool = True) -> None:
        self.every, self.budget, self.chosen = every, budget, chosen
        self.first = 0  # update of the first measurement, or of the calibration
        self.calibrated = budget is None
        self.ranks = Ranks()  # which fix the interval together
        self.clock: Clock = HostClock()
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._spent, self._updates = 0.0, 0
        self._plain: deque[float] = deque(maxlen=REMEMBERED)
        self._costs: list[float] = []
        self._last: Any | None = None  # end of the update before
        self._measuring: list[tuple[Any, Any]] = []
        self._unread: deque[_Update] = deque()

    def keep_time_on(self, device: torch.device) -> None:
        """Use the clock of this device from now on."""
        if device != self.clock.device and (clock := clock_of(device)).device != self.clock.device:
            self.clock = clock
            self._restart_clock()

    def due(self, update: int) -> bool:
        """Whether this update (counted from 0) is measured."""
        if not self.calibrated:
            return update >= self.first
        return update >= self.first and (update - self.first) % self.every == 0

    def measuring(self) -> _Measuring:
        """The time spent inside counts as measuring."""
        return _Measuring(self)

    def end_update(self, update: int, measured: bool | None) -> None:
        """Mark the end of an update; at the end of the calibration, fix the interval (on all ranks at once).

        Args:
            update: its number.
            measured: whether a measurement was made, on whichever rank; None where :meth:`resolve` will tell. An update
                without one says nothing about the cost of a measurement.
        """
        if capturing():
            self._last = None  # what is captured runs later
            return
        now = self.clock.mark()
        self._unread.append(_Update(self._last, now, self._measuring, measured))
        self._last, self._measuring = now, []
        self._read()
        # Here, where every rank passes in every update; the last cost may become known on one rank alone.
        if not self.calibrated and len(self._costs) >= CALIBRATION:
            self._calibrate(update)

    def resolve(self, measured: bool) -> None:
        """Whether a measurement was made in the first update that ended without knowing."""
        for update in self._unread:
            # The mark passed long ago; without waiting, ranks might read it in different updates, and calibrate then.
            self.clock.wait(update.end)
            if update.measured is None:
                update.measured = measured
                break
        self._read()

    def _read(self) -> None:
        clock = self.clock
        while self._unread and self._unread[0].measured is not None and clock.passed(self._unread[0].end):
            update, cost = self._unread.popleft(), 0.0
            for begin, end in update.measuring:
                cost += clock.between(begin, end)
                clock.release(begin)
                clock.release(end)
            if update.begin is not None:
                self._plain.append(clock.between(update.begin, update.end) - cost)
                clock.release(update.begin)  # its end is the begin of the next one, which releases it
                self._spent += cost
                self._updates += 1
                if self._updates == EXPENSIVE_AFTER and not self.chosen:
                    self._warn_if_expensive()
            if update.measured and not self.calibrated:
                self._costs.append(cost)

    def _warn_if_expensive(self) -> None:
        if (share := self.overhead()) > EXPENSIVE:
            warnings.warn(
                f"measuring has taken {share:.0%} of the time of {self._updates} updates, at every {self.every} of "
                "them, the signal's default interval, which stays in force. budget=0.03 finds the interval at which it "
                "takes 3 %, and every=N sets one",
                UserWarning,
                stacklevel=2,
            )

    def _calibrate(self, update: int) -> None:
        assert self.budget is not None
        cost, plain = statistics.fmean(self._costs[WARM_UP:CALIBRATION]), statistics.median(self._plain)
        if self.ranks.count > 1:
            times = torch.tensor([cost, plain], dtype=torch.float64, device=self.clock.device)
            cost, plain = self.ranks.summed(times).tolist()
        pays = MARGIN * cost / (self.budget * plain)  # updates that pay for one measurement
        made = len(self._costs) + sum(one.measured is not False for one in self._unread)
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
        """A copy keeps what was read; marks of a clock mean nothing in another process."""
        return {**self.__dict__, "_last": None, "_measuring": [], "_unread": deque()}
