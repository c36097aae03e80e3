"""Measurements that are applied one step late, as those of a GPU are: the same bits, and nothing read early."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from doubles import copies_deferred, unread
from signal_runs import SIGNALS
from toy import BASES, batches, each_form, loss_of, make, nets, same, train, watched, weights

import lwkd
from lwkd.rates.device import HostCopy
from lwkd.rates.layer_rates import LayerRates
from lwkd.rates.schedule import CALIBRATION

ALL: dict[str, Any] = {"attention": "attention", **SIGNALS}


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return copies_deferred(monkeypatch)


def test_a_tensor_of_the_cpu_is_there_at_once() -> None:
    tensor = torch.tensor([1.0, 2.0])
    copy = HostCopy(tensor)
    assert not copy.deferred
    assert copy.tensor() is tensor


def everything(shown: Any, student: Any) -> dict[str, Any]:
    state = shown._rates.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return {"numbers": str((state, shown.standard_errors)), **tensors, **weights(student)}


@each_form
@pytest.mark.parametrize("signal", ALL.values(), ids=ALL)
def test_results_are_the_same_bits(form: str, signal: Any) -> None:
    found = []
    for late in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            log = copies_deferred(patch) if late else []
            student, teacher, optimizer, shown = watched(form, signal=signal, every=1)
            train(optimizer, student, teacher, 12)
            found.append(everything(shown, student))
            assert len(log) == 24 * late
    one, other = found
    assert one.pop("numbers") == other.pop("numbers")
    assert same(one, other)


@each_form
@pytest.mark.parametrize("signal", ["attention", "jacobian", "hessian"])
def test_it_is_read_in_the_next_step_and_not_earlier(form: str, signal: str, log: list[Any]) -> None:
    student, teacher, optimizer, shown = watched(form, signal=signal, every=1)
    for step, (x, y) in enumerate(batches(4)):
        optimizer.zero_grad()
        loss_of(student, teacher, x, y).backward()
        log.append(f"step {step}")
        optimizer.step()
    assert log == ["step 0", "launched"] + [
        entry for step in range(1, 4) for entry in (f"step {step}", "read", "launched")
    ]
    assert shown.rates
    assert log[-1] == "read"


@pytest.mark.parametrize("signal", ["attention", "jacobian", "hessian"])
def test_nothing_is_read_behind_an_update(signal: str, log: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The default estimators as well; the check before the first measurement may read."""
    student, teacher, optimizer, _ = watched(signal=signal, every=1)
    train(optimizer, student, teacher, 1)
    after_step = LayerRates.after_step

    def finished(*args: Any) -> None:
        with unread():
            after_step(*args)

    monkeypatch.setattr(LayerRates, "after_step", finished)
    train(optimizer, student, teacher, 10)
    assert log.count("launched") == 11


READINGS = {
    "rates": lambda shown: shown.rates,
    "divergences": lambda shown: shown.divergences,
    "skipped": lambda shown: shown.skipped,
    "standard_errors": lambda shown: shown.standard_errors,
    "overhead": lambda shown: shown.overhead(),
    "state_dict": lambda shown: shown.state_dict(),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "close": lambda shown: shown.close(),
}


@pytest.mark.parametrize("reading", READINGS.values(), ids=READINGS)
def test_whoever_reads_takes_it_in(reading: Any, log: list[Any]) -> None:
    student, teacher, optimizer, shown = watched()
    train(optimizer, student, teacher, 1)
    assert log == ["launched"]
    reading(shown)
    assert log == ["launched", "read"]
    assert set(shown.rates.values()) != {1.0}
    assert log == ["launched", "read"], "once"


def test_a_state_that_is_loaded_ends_what_is_on_its_way(log: list[Any]) -> None:
    student, teacher, optimizer, shown = watched()
    saved = optimizer.state_dict()
    train(optimizer, student, teacher, 1)
    optimizer.load_state_dict(saved)
    assert set(shown.rates.values()) == {1.0}
    assert log == ["launched"]


@pytest.mark.parametrize("late", [False, True])
def test_infinite_gradients_drop_the_measurement(late: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if late:
            copies_deferred(patch)
        student, teacher, optimizer, shown = watched()
        train(optimizer, student, teacher, 2)
        before = shown.rates, shown.divergences
        for infinite in (torch.tensor(1.0), torch.tensor([float("inf")]), torch.tensor(True)):
            loss_of(student, teacher, *next(batches(1, seed=7)))
            shown._rates.after_step(infinite)
            assert (shown.rates, shown.divergences, shown.skipped, shown.measurements) == (*before, 0, 2)
        loss_of(student, teacher, *next(batches(1, seed=7)))
        shown._rates.after_step(torch.tensor(0.0))
        assert shown.measurements == 3
        assert shown.divergences != before[1]


def test_steps_without_a_pass_are_said_as_ever(log: list[Any]) -> None:
    student, teacher, optimizer, _ = watched()
    train(optimizer, student, teacher, 1)
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        optimizer.step()
    with pytest.warns(UserWarning, match="three steps in a row"):
        optimizer.step()
    assert log == ["launched", "read"]


@pytest.mark.parametrize("reads", [False, True])
def test_the_interval_is_fixed_at_one_update_whoever_reads_in_between(reads: bool, log: list[Any]) -> None:
    student, teacher, optimizer, shown = watched(budget=0.5)
    schedule = shown._rates.schedule
    for update, (x, y) in enumerate(batches(CALIBRATION + 1)):
        assert not schedule.calibrated
        loss_of(student, teacher, x, y).backward()
        optimizer.step()
        if reads and update < CALIBRATION:
            assert shown.overhead() >= 0
            assert not schedule.calibrated
    assert schedule.calibrated
    assert schedule.first > CALIBRATION


def test_nets_on_two_devices_are_named() -> None:
    for signal in ("attention", "jacobian"):
        student, teacher, pairing = nets()
        make("wrapper", BASES["sgd"](student.parameters()), student, teacher, pairing, signal=signal, every=1)
        teacher.to("meta")
        with torch.no_grad():
            teacher(torch.rand(4, 1, 8, 8, device="meta"))
        message = r"the student \(Sequential\) is on cpu, the teacher \(Sequential\) on meta.*teacher.to\('cpu'\)"
        with pytest.raises(RuntimeError, match=message):
            student(torch.rand(4, 1, 8, 8))
    with pytest.raises(RuntimeError, match=message):
        lwkd.signals.Hessian().measure(student, teacher, pairing, torch.rand(4, 1, 8, 8))


@pytest.mark.parametrize("late", [False, True])
def test_a_teacher_under_inference_mode_that_comes_second(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if late:
        copies_deferred(monkeypatch)
    student, teacher, optimizer, shown = watched()
    for x, _ in batches(4):
        for rows in (x[:2], x[2:]):  # two passes before every update
            student(rows).sum().backward()
            with torch.inference_mode():
                teacher(rows)
        optimizer.step()
    assert shown.passes == {"measured": 8}
    assert (shown.measurements, shown.skipped) == (4, 0)
