"""Signals that make passes of their own: what they are measured on, and what is saved, resumed and copied."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from saved_runs import resume, saved, through_a_file
from signal_runs import SIGNALS, each
from torch import Tensor, nn
from toy import batches, each_form, loss_of, nets, same, train, train_on, watched, weights

import lwkd
from lwkd.rates.batch_replay import SEEDS_APART
from lwkd.signals import Hessian, Jacobian
from lwkd.signals.teacher_curvature import TeacherCurvature


def expected_divergences(signal: Any, student: nn.Module, teacher: nn.Module, x: Tensor, update: int) -> list[float]:
    """Measured by hand: after the update, with its number's seed."""
    statistics = signal.measure(student, teacher, nets()[2], x, seed=update * SEEDS_APART)
    return signal.divergence(statistics.float()).tolist()


@each_form
@each
def test_the_first_rows_of_the_last_batch_are_measured(form: str, signal: Any) -> None:
    """Gradients of two batches are added up, and a validation pass follows."""
    student, teacher, optimizer, shown = watched(form, signal=signal, every=1, samples=3)
    for x, y in batches(2):
        loss_of(student, teacher, x, y).backward()
    with torch.no_grad():
        student(torch.rand(4, 1, 8, 8))
    optimizer.step()
    assert shown.passes == {"measured": 2, "no_grad": 1}
    assert shown.measurements == 1
    found = expected_divergences(signal, student, teacher, x[:3], 0)
    assert list(shown.divergences.values()) == found


@each
def test_more_samples_than_rows(signal: Any) -> None:
    student, teacher, optimizer, shown = watched(signal=signal, every=1, samples=64)
    train(optimizer, student, teacher, 1)
    ((x, _),) = batches(1)
    assert list(shown.divergences.values()) == expected_divergences(signal, student, teacher, x, 0)


def test_every_and_samples_are_the_signals() -> None:
    signal = Jacobian(samples=2)
    student, teacher, optimizer, shown = watched(signal=signal)
    train(optimizer, student, teacher, 2 * signal.every)
    assert shown.measurements == 2
    assert shown.passes == {"measured": 2, "not_due": 2 * signal.every - 2}
    student, teacher, optimizer, shown = watched(signal=signal)
    train(optimizer, student, teacher, 1)
    (x, _), *_ = batches(1)
    assert list(shown.divergences.values()) == expected_divergences(signal, student, teacher, x[:2], 0)


def test_every_update_draws_its_own_probes() -> None:
    student, teacher, optimizer, shown = watched(signal="jacobian", every=1, policy=lwkd.Constant(1.0))
    train(optimizer, student, teacher, 2)
    x = list(batches(2))[1][0]
    assert list(shown.divergences.values()) == expected_divergences(Jacobian(), student, teacher, x, 1)


def test_a_batch_that_is_changed_after_the_pass_does_not_matter() -> None:
    student, teacher, optimizer, shown = watched(signal="jacobian", every=1)
    ((x, y),) = batches(1)
    kept = x.clone()
    loss_of(student, teacher, x, y).backward()
    x.fill_(float("nan"))
    optimizer.step()
    assert list(shown.divergences.values()) == expected_divergences(Jacobian(), student, teacher, kept, 0)


@each
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(signal: Any, how: str) -> None:
    """A copy of the three goes on as the original does, once it watches."""
    original = watched(signal=signal, every=1)[:3]
    train(original[2], *original[:2], 2)
    copied = copy.deepcopy(original) if how == "deepcopy" else pickle.loads(pickle.dumps(original))
    assert copied[2].rates == original[2].rates
    copied[2].watch(*copied[:2])
    for student, teacher, optimizer in (original, copied):
        train(optimizer, student, teacher, 2, seed=5)
    assert same(weights(copied[0]), weights(original[0]))
    assert copied[2].rates == original[2].rates
    assert set(copied[2].rates.values()) != {1.0}
    assert str(copied[2].standard_errors) == str(original[2].standard_errors)


RESUMED = {
    **SIGNALS,
    "settled ggn": Hessian(tolerance=1e6),
    "settled hessian": Hessian(curvature="hessian", tolerance=1e6),
}


@each_form
@pytest.mark.parametrize("signal", RESUMED.values(), ids=RESUMED)
def test_resume_in_the_middle_is_bitwise(form: str, signal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seeds of the probes, the spread, and the teacher's curvature, settled or not, are part of the state."""
    settles = getattr(signal, "tolerance", 0) == 1e6
    if settles:  # in as few updates as possible
        monkeypatch.setattr(TeacherCurvature, "EAGER", TeacherCurvature.AT_LEAST)
    first, data = (9 if settles else 4), list(batches(13 if settles else 8))
    student, teacher, optimizer, shown = watched(form, signal=signal, every=1)
    train_on(optimizer, student, teacher, data[:first])
    state = saved(student, optimizer, shown)
    memory = shown._rates.teacher
    assert (memory is not None and memory.known is not None) == settles
    train_on(optimizer, student, teacher, data[first:])

    again, teacher, optimizer, resumed = watched(form, signal=signal, every=1)
    resume(state, again, optimizer, resumed)
    train_on(optimizer, again, teacher, data[first:])
    assert same(weights(again), weights(student))
    assert resumed.rates == shown.rates
    assert resumed.divergences == shown.divergences
    assert resumed.standard_errors == shown.standard_errors
    assert len(set(shown.rates.values())) > 1, "the run must have had rates to lose"


OTHERS = [
    (Jacobian(), Hessian()),
    (Hessian(), "attention"),
    ("attention", Jacobian()),
    (Jacobian(), Jacobian(kind="norm")),
    (Hessian(), Hessian("input")),
    (Hessian("input"), Jacobian(kind="relative")),
    # The teacher's curvature of the one would count as that of the other.
    (Hessian(), Hessian(curvature="hessian")),
    (Jacobian(kind="norm"), Jacobian("parameters")),
    (Jacobian(), Jacobian(estimator="output")),
]


@each_form
@pytest.mark.parametrize(("before", "loaded"), OTHERS)
def test_the_state_of_another_signal_is_refused(form: str, before: Any, loaded: Any) -> None:
    student, teacher, optimizer, shown = watched(form, signal=before, every=1)
    train(optimizer, student, teacher, 1)
    state = through_a_file(shown.state_dict())
    *_, other = watched(form, signal=loaded, every=1)
    untouched = other.state_dict()
    with pytest.raises(ValueError, match=r"rate state has .* another pairing or signal"):
        other.load_state_dict(state)
    assert str(other.state_dict()) == str(untouched)
