"""Clocks that the tests turn, and runs whose updates take what they are told to."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lwkd.rates.schedule import Schedule

PRICES = [(0.5, 1.0, 0.1), (0.2, 1.0, 0.05), (2.0, 1.0, 0.5), (0.02, 0.01, 0.5), (0.03, 1.0, 0.02)]
UPDATES = 500


class Clock:
    """Stands still unless it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Run:
    """Updates whose duration and cost of measuring are given; what they really took is kept.

    When it is late, every measurement is resolved when the next update is about to end; its events have passed by then.
    """

    def __init__(
        self, clock: Clock, schedule: Schedule, step: float, cost: Callable[[int], float], late: bool = False
    ) -> None:
        self.clock, self.schedule, self.step, self.cost, self.late = clock, schedule, step, cost, late
        self.update, self.due, self.costs = 0, list[int](), list[float]()

    def __call__(self, updates: int, passes: bool = True) -> Run:
        for _ in range(updates):
            self.clock.now += self.step
            if self.late and self.update - 1 in self.due[-1:]:
                self.schedule.resolve(passes)
            due = self.schedule.due(self.update)
            if due:
                self.due.append(self.update)
                self.costs.append(self.cost(self.update) if passes else 1e-6)
                with self.schedule.measuring():
                    self.clock.now += self.costs[-1]
            self.schedule.end_update(self.update, None if self.late and due else passes and due)
            self.update += 1
        return self

    @property
    def overhead(self) -> float:
        """All measuring so far, calibration and first measurement included."""
        return sum(self.costs) / (self.update * self.step)


class DeviceTime:
    """A clock whose marks pass later, as events on a GPU do: nothing may be read before."""

    device = torch.device("cpu")

    def __init__(self, clock: Clock) -> None:
        self.clock, self.reached, self.waited = clock, float("-inf"), 0

    def mark(self) -> float:
        return self.clock.now

    def between(self, begin: float, end: float) -> float:
        assert begin <= end <= self.reached, "read before it has passed"
        return end - begin

    def release(self, mark: float) -> None:
        pass

    def passed(self, mark: float) -> bool:
        return mark <= self.reached

    def wait(self, mark: float) -> None:
        self.waited += mark > self.reached
        self.reached = max(self.reached, mark)
