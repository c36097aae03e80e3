"""Costs that become known one update late, as those on a GPU do, and what is not timed at all."""

from __future__ import annotations

import copy
import math

import pytest
from clocks import PRICES, UPDATES, Clock, DeviceTime, LateRun, Run
from tolerances import CLOSED_FORM

from lwkd.rates import device as module
from lwkd.rates.schedule import CALIBRATION, MARGIN, Schedule


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module.time, "perf_counter", found)
    return found


@pytest.mark.parametrize(("cost", "step", "budget"), PRICES)
def test_a_budget_is_kept_when_measurements_are_late(clock: Clock, cost: float, step: float, budget: float) -> None:
    schedule = Schedule(20, budget)
    schedule.clock = DeviceTime(clock)
    run = LateRun(clock, schedule, step, lambda _: cost)(CALIBRATION)
    assert not schedule.calibrated
    run(1)
    assert run.due == list(range(CALIBRATION + 1)), "one measurement is made before the last cost is known"
    assert schedule.calibrated
    assert schedule.every == math.ceil(MARGIN * cost / (budget * step))
    while run.update < UPDATES:
        run(1)
        if len(run.due) > CALIBRATION + 1:
            assert run.overhead <= budget
    assert run.overhead > 0.5 * budget
    schedule.resolve(True)
    assert abs(schedule.overhead() - sum(run.costs[1:]) / ((UPDATES - 1) * step)) < CLOSED_FORM


def test_marks_are_read_when_they_have_passed_and_not_waited_for(clock: Clock) -> None:
    schedule, time = Schedule(2), DeviceTime(clock)
    schedule.clock = time
    Run(clock, schedule, 1.0, lambda _: 0.5)(6)
    assert (time.waited, schedule.overhead()) == (0, 0.0)
    time.reached = clock.now
    Run(clock, schedule, 1.0, lambda _: 0.5)(1)
    assert time.waited == 0
    assert abs(schedule.overhead() - 2 * 0.5 / 5) < CLOSED_FORM


def test_nothing_is_timed_in_a_capture(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, captured = Schedule(1), Schedule(1)
    Run(clock, plain, 1.0, lambda _: 0.5)(6)
    run = Run(clock, captured, 1.0, lambda _: 0.5)(3)
    with monkeypatch.context() as patch:
        patch.setattr("lwkd.rates.schedule.capturing", lambda: True)
        run.cost = lambda _: 1000.0
        run(1)
    run.cost = lambda _: 0.5
    run(4)
    assert captured.overhead() == plain.overhead()
    assert captured._updates == 5, "neither the captured update nor the first after it"


def test_a_copy_has_no_marks_of_the_original(clock: Clock) -> None:
    schedule = Schedule(1)
    schedule.clock = DeviceTime(clock)
    run = Run(clock, schedule, 1.0, lambda _: 0.5)(3)
    copied = copy.deepcopy(schedule)
    assert not copied._unread
    assert len(schedule._unread) == 3
    copied.clock, run.schedule = schedule.clock, copied
    clock.now += 3600.0
    run(2)
    assert copied._last == clock.now
