"""When a measurement is due and what it has cost: a clock that the test turns, and one real run.

Costs may become known one update late, as those on a GPU do.
"""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import pytest
import torch
from clocks import PRICES, UPDATES, Clock, DeviceTime, Run
from saved_runs import through_a_file
from tolerances import CLOSED_FORM, NOISY_BUDGET
from toy import FORMS, batches, loss_of, train, watched

from lwkd.rates import device as module
from lwkd.rates.schedule import CALIBRATION, MARGIN, Schedule


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module.time, "perf_counter", found)
    return found


def test_due_at_every_so_many_updates(clock: Clock) -> None:
    assert Run(clock, Schedule(5), 1.0, lambda _: 9.0)(21).due == [0, 5, 10, 15, 20]
    assert Run(clock, Schedule(1), 1.0, lambda _: 9.0)(4).due == [0, 1, 2, 3]


@pytest.mark.parametrize(("cost", "step", "budget"), PRICES)
def test_a_budget_is_kept_from_the_end_of_the_calibration_debt_on(
    clock: Clock, cost: float, step: float, budget: float
) -> None:
    schedule = Schedule(20, budget)
    run = Run(clock, schedule, step, lambda _: cost)(CALIBRATION)
    assert run.due == list(range(CALIBRATION))
    assert schedule.calibrated
    assert schedule.every == math.ceil(MARGIN * cost / (budget * step))
    while run.update < UPDATES:
        run(1)
        if len(run.due) > CALIBRATION:  # at any moment from the first measurement after the calibration on
            assert run.overhead <= budget
    assert run.overhead <= budget
    assert run.overhead > 0.5 * budget, "and it is made use of"
    later = run.due[CALIBRATION:]
    assert later == list(range(later[0], UPDATES, schedule.every))


def test_what_costs_next_to_nothing_is_measured_at_every_update(clock: Clock) -> None:
    schedule = Schedule(20, 0.02)
    run = Run(clock, schedule, 1.0, lambda _: 0.01)(UPDATES)
    assert schedule.every == 1
    assert run.due[CALIBRATION:] == list(range(run.due[CALIBRATION], UPDATES))
    assert 0.009 < run.overhead <= 0.02


@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_a_budget_is_kept_on_average_when_costs_are_noisy(clock: Clock, noise: float) -> None:
    overheads = []
    for seed in range(100):
        source = random.Random(seed)
        cost = lambda _, source=source: 0.5 * math.exp(source.gauss(0, noise))  # noqa: E731
        overheads.append(Run(clock, Schedule(20, 0.05), 1.0, cost)(UPDATES).overhead / 0.05)
    assert sum(overheads) / len(overheads) <= 1
    share, worst = NOISY_BUDGET[noise]
    assert sum(o > 1 for o in overheads) <= 100 * share
    assert max(overheads) < worst


def test_a_slow_first_measurement_neither_fixes_the_interval_nor_is_paid_off(clock: Clock) -> None:
    plain, slow = Schedule(20, 0.1), Schedule(20, 0.1)
    Run(clock, plain, 1.0, lambda _: 0.5)(10)
    Run(clock, slow, 1.0, lambda update: 50.0 if update == 0 else 0.5)(10)
    assert (slow.every, slow.first) == (plain.every, plain.first)


def test_a_slow_first_update_does_not_fix_the_interval(clock: Clock) -> None:
    schedule = Schedule(20, 0.1)
    run = Run(clock, schedule, 100.0, lambda _: 0.5)(1)
    run.step = 1.0
    run(CALIBRATION - 1)
    assert schedule.every == math.ceil(MARGIN * 0.5 / 0.1)


def test_updates_without_a_pass_calibrate_nothing(clock: Clock) -> None:
    """Looking for a pass takes a moment: were that taken for the cost, everything would be measured ever after."""
    schedule = Schedule(20, 0.1)
    run = Run(clock, schedule, 1.0, lambda _: 2.0)(7, passes=False)
    assert not schedule.calibrated
    assert run.due == list(range(7)), "looks again at every update"
    run(2)(5, passes=False)
    assert not schedule.calibrated
    run(2)
    assert schedule.calibrated
    assert schedule.every == math.ceil(MARGIN * 2.0 / 0.1)


def test_overhead_is_what_the_clock_says(clock: Clock) -> None:
    schedule = Schedule(4)
    assert schedule.overhead() == 0
    run = Run(clock, schedule, 2.0, lambda update: 1.0 + update % 3)(1)
    assert schedule.overhead() == 0, "the first update is not known to have begun"
    run(3000)
    assert abs(schedule.overhead() - sum(run.costs[1:]) / (3000 * 2.0)) < CLOSED_FORM
    rare = Schedule(1000)
    run = Run(clock, rare, 1.0, lambda _: 100.0)(3001)
    assert abs(rare.overhead() - 0.1) < CLOSED_FORM, "however seldom it is measured"


def test_pauses_between_updates_flatter_nothing(clock: Clock) -> None:
    schedule = Schedule(2)
    run = Run(clock, schedule, 1.0, lambda _: 1.0)(101)
    before = schedule.overhead()
    for _ in range(5):
        clock.now += 3600.0
        run(100)
    assert abs(schedule.overhead() - before) < 0.01 * before
    budget = Schedule(20, 0.1)
    run = Run(clock, budget, 1.0, lambda _: 0.5)(2)
    clock.now += 3600.0
    run(10)
    assert budget.every == math.ceil(MARGIN * 0.5 / 0.1)


def test_a_fixed_interval_and_its_debt_are_saved(clock: Clock) -> None:
    run = Run(clock, Schedule(20, 0.1), 1.0, lambda _: 0.5)(10)
    other = Schedule(20, 0.1)
    other.load_state_dict(through_a_file(run.schedule.state_dict()), 10)
    assert [other.due(k) for k in range(10, 200)] == [run.schedule.due(k) for k in range(10, 200)]
    assert other.every == run.schedule.every != 20
    again = Run(clock, other, 1.0, lambda _: 7.0)
    again.update = 10
    again(200)
    assert other.every == run.schedule.every, "fixed"


def test_an_unfinished_calibration_starts_again(clock: Clock) -> None:
    run = Run(clock, Schedule(20, 0.1), 1.0, lambda _: 0.5)(2)
    other = Schedule(20, 0.1)
    other.load_state_dict(through_a_file(run.schedule.state_dict()), 2)
    again = Run(clock, other, 1.0, lambda _: 2.0)
    again.update = 2
    again(CALIBRATION - 1)
    assert not other.calibrated
    again(1)
    assert other.every == math.ceil(MARGIN * 2.0 / 0.1)
    assert again.due == [2, 3, 4, 5]


def test_settings_are_those_of_the_object_that_loads(clock: Clock) -> None:
    with_budget = Run(clock, Schedule(20, 0.1), 1.0, lambda _: 5.0)(10).schedule
    for saved_by, loaded_by, every in (
        (with_budget, Schedule(7), 7),
        (Schedule(5), Schedule(20, 0.1), 20),
        (with_budget, Schedule(20, 0.3), 20),
    ):
        loaded_by.load_state_dict(through_a_file(saved_by.state_dict()), 14)
        assert loaded_by.every == every
        assert loaded_by.due(14), "an interval of one's own starts now, and so does a calibration"
        assert loaded_by.calibrated is (loaded_by.budget is None)


@pytest.mark.parametrize(("cost", "step", "budget"), PRICES)
def test_a_budget_is_kept_when_measurements_are_late(clock: Clock, cost: float, step: float, budget: float) -> None:
    schedule = Schedule(20, budget)
    schedule.clock = DeviceTime(clock)
    run = Run(clock, schedule, step, lambda _: cost, late=True)(CALIBRATION)
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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("signal", ["hessian", "attention", "jacobian"])
def test_a_real_run_with_a_budget(form: str, signal: str) -> None:
    student, teacher, optimizer, shown = watched(form, signal=signal, budget=0.5)
    train(optimizer, student, teacher, 30)
    assert isinstance(shown.every, int)
    assert shown.every >= 1
    assert 0 < shown.overhead() < float("inf")
    assert shown._rates.schedule.calibrated
    assert shown.passes["measured"] >= CALIBRATION
    assert set(shown.divergences.values()) != {0.0}


def test_a_real_run_without_passes_stays_uncalibrated() -> None:
    student, teacher, optimizer, shown = watched(signal="hessian", budget=0.5)

    def without_teacher() -> None:
        for x, _ in batches(8):
            student(x).sum().backward()
            optimizer.step()

    with pytest.warns(UserWarning, match="three steps in a row"):
        without_teacher()
    assert not shown._rates.schedule.calibrated
    for x, y in batches(CALIBRATION):
        loss_of(student, teacher, x, y).backward()
        optimizer.step()
    assert shown._rates.schedule.calibrated


@pytest.mark.parametrize(("cost", "warned"), [(0.9, False), (1.1, True)])
def test_a_default_interval_that_takes_a_tenth_of_the_time_is_warned_of_once(
    clock: Clock, cost: float, warned: bool, recwarn: pytest.WarningsRecorder
) -> None:
    for chosen in (True, False):
        # An expensive first measurement, which is not repeated, does not count.
        run = Run(clock, Schedule(10, chosen=chosen), 1.0, lambda update: cost if update else 500.0)(100)
        assert not recwarn.list
        run(200)
    texts = [str(found.message) for found in recwarn.list]
    assert len(texts) == warned
    assert all("11% of the time of 100 updates, at every 10 of them" in text for text in texts)


@pytest.mark.parametrize(("options", "chosen"), [({}, False), ({"every": 1}, True), ({"budget": 0.1}, True)])
def test_an_interval_or_a_budget_is_a_choice(options: dict[str, Any], chosen: bool) -> None:
    assert watched(signal="jacobian", **options)[3]._rates.schedule.chosen == chosen


def test_refused_budgets() -> None:
    for options in ({"budget": 0.1, "every": 5}, {"budget": 0.0}, {"budget": 1.5}, {"budget": -0.1}):
        with pytest.raises(ValueError, match=r"budget is .*; expected a budget in \(0, 1\]"):
            watched(**options)
    with pytest.raises(ValueError, match="budget is nan"):
        watched(budget=float("nan"))


def test_marks_of_a_clock_are_taken_back_once_and_not_read_again() -> None:
    """Events of a GPU are recorded again: one that is still to be read would give another update's time."""

    class Pool:
        device = torch.device("cpu")

        def __init__(self) -> None:
            self.made, self.spare, self.now = 0, list[list[float]](), 0.0

        def mark(self) -> list[float]:
            self.made += not self.spare
            self.now += 1
            mark = self.spare.pop() if self.spare else []
            mark[:] = [self.now]
            return mark

        def between(self, begin: list[float], end: list[float]) -> float:
            assert not any(mark is spare for mark in (begin, end) for spare in self.spare)
            return end[0] - begin[0]

        def passed(self, mark: list[float]) -> bool:
            return self.now >= mark[0] + 4  # an update and a half later

        def wait(self, mark: list[float]) -> None:
            pass

        def release(self, mark: list[float]) -> None:
            assert not any(mark is spare for spare in self.spare)
            self.spare.append(mark)

    schedule, pool = Schedule(1), Pool()
    schedule.clock = pool
    for update in range(50):
        with schedule.measuring():
            pass
        schedule.end_update(update, True)
    assert pool.made < 12
    assert schedule.overhead() == 0.5
