"""How long the rest of a run takes, when some of its updates are slower than others and epochs end with a test."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

Lap = Literal["plain", "measured", "epoch"]

REMEMBERED: dict[Lap, int] = {"plain": 101, "measured": 21, "epoch": 5}
"""Laps whose median counts: enough that a hiccup moves nothing, few enough to follow a machine that becomes slower."""


class Pace:
    """Times plain updates, measured updates and what comes at the end of an epoch apart.

    One mean over all of them would jump with every measurement, until many lie inside its window.

    Args:
        clock: gives seconds.

    >>> seconds = iter([0.0, 5.0, 6.0, 7.0])
    >>> pace = Pace(lambda: next(seconds))
    >>> pace.lap("measured"), pace.lap("plain"), pace.lap("plain")
    (None, None, None)
    >>> pace.left(updates=100, epochs=0, every=20)
    120.0
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._last = clock, clock()
        self._took: dict[Lap, deque[float]] = {lap: deque(maxlen=count) for lap, count in REMEMBERED.items()}
        self._warm_up: Lap | None = None
        self._laps = 0

    def lap(self, lap: Lap) -> None:
        """An update, or the end of an epoch, has just been finished."""
        now = self._clock()
        took = self._took[lap]
        if self._warm_up == lap:
            took.clear()  # the first update of all also fetched memory; there is a better one now
            self._warm_up = None
        took.append(now - self._last)
        if not self._laps:
            self._warm_up = lap
        self._last, self._laps = now, self._laps + 1

    def left(self, updates: int, epochs: int, every: int) -> float | None:
        """Seconds to the end; None before the first update.

        Args:
            updates: still to come.
            epochs: ends of epochs still to come.
            every: updates from one measurement to the next.
        """
        plain, measured, epoch = (self._took[lap] for lap in REMEMBERED)
        if not (plain or measured):
            return None
        usual, slow = statistics.median(plain or measured), statistics.median(measured or plain)
        measurements = updates / every
        ends = epochs * statistics.median(epoch) if epoch else 0.0
        return (updates - measurements) * usual + measurements * slow + ends
