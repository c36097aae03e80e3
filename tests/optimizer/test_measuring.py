"""Measuring leaves no trace in training, and bad input is counted or named, never fatal to the run."""

from __future__ import annotations

import copy
import random
import resource
import warnings
from typing import Any

import pytest
import torch
from signal_runs import tensors_alive
from torch import nn
from toy import BASES, FORMS, batches, each_form, make, nets, same, train, watched, weights

import lwkd


@each_form
def test_measuring_leaves_no_trace(form: str) -> None:
    class Noisy(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(self.inner(x), 0.5, self.training)

    def run(wrapped: bool) -> Any:
        student, teacher, _ = nets()
        student.low, calls = Noisy(student.low), []
        student.high.register_forward_hook(lambda *_: calls.append(1))
        pairing = lwkd.pair(student, teacher, torch.rand(1, 1, 8, 8), layers={"low": "low", "high": "high"})
        calls.clear()
        base, how = BASES["sgd"](student.parameters()), form if wrapped else "bare"
        optimizer, shown = make(how, base, student, teacher, pairing, policy=lwkd.Constant(1.0))
        torch.manual_seed(3)
        random.seed(3)
        train(optimizer, student, teacher, 3)
        if wrapped:
            assert shown.passes["measured"] == 3
        gradients = {n: p.grad.clone() for n, p in student.named_parameters()}
        modes = [m.training for net in (student, teacher) for m in net.modules()]
        return weights(student), gradients, weights(teacher), torch.get_rng_state(), random.getstate(), modes, calls

    bare, measured = run(False), run(True)
    for index in range(3):
        assert same(bare[index], measured[index])
    assert torch.equal(bare[3], measured[3])
    assert bare[4:] == measured[4:]


@pytest.mark.parametrize(
    ("form", "signal", "steps"),
    [
        *((form, "attention", 500) for form in FORMS),
        # Those of the wrapper, with more signals, are in rates/test_batch_replay.py.
        *(("attach", signal, 60) for signal in ("jacobian", "hessian")),
    ],
)
def test_memory_is_flat_and_gradients_carry_no_graph(form: str, signal: str, steps: int) -> None:
    student, teacher, optimizer, shown = watched(form, signal=signal, every=1)

    train(optimizer, student, teacher, steps // 10)
    before, peak = tensors_alive(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train(optimizer, student, teacher, steps)
    assert shown.measurements == steps + steps // 10
    count, elements = tensors_alive()
    # Fewer is no leak: what earlier tests left behind may go at any time.
    assert count <= before[0]
    assert elements <= before[1]
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown_kb < 8 * 1024, f"{steps} steps on tensors of a few kB must not need another 8 MB"
    for parameter in student.parameters():
        assert parameter.grad is not None
        assert parameter.grad.grad_fn is None
        assert not parameter.grad.requires_grad


@each_form
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_divergences_leave_the_rates_and_are_counted(form: str, bad: float) -> None:
    student, teacher, optimizer, shown = watched(form)
    train(optimizer, student, teacher, 2)
    rates, divergences = shown.rates, shown.divergences
    handles = [
        layer.register_forward_hook(lambda _m, _a, out: out * bad, prepend=True)
        for layer in (student.low, teacher.high)
    ]
    x, _ = next(batches(1))
    with torch.no_grad():
        teacher(x)
    student(x)
    for handle in handles:
        handle.remove()
    optimizer.zero_grad()
    optimizer.step()
    assert shown.skipped == 1
    assert (shown.rates, shown.divergences) == (rates, divergences)
    train(optimizer, student, teacher, 1)
    assert shown.skipped == 1
    assert shown.divergences != divergences, "training and measuring go on"


@each_form
def test_all_zero_divergence_is_counted(form: str) -> None:
    student, _, _ = nets()
    student.eval()
    twin = copy.deepcopy(student)
    pairing = lwkd.pair(student, twin, torch.rand(1, 1, 8, 8), layers={"low": "low", "high": "high"})
    optimizer, shown = make(form, BASES["sgd"](student.parameters()), student, twin, pairing)
    train(optimizer, student, twin, 1)
    assert shown.skipped == 1
    assert set(shown.rates.values()) == {1.0}


def test_a_step_without_a_pass_changes_no_rate_and_is_said_after_three() -> None:
    student, _, optimizer, shown = watched()
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        optimizer.step()
    with pytest.warns(UserWarning, match="three steps in a row had no student pass matched with a teacher pass"):
        optimizer.step()
    assert set(shown.rates.values()) == {1.0}
    assert shown.skipped == 0


def test_batch_sizes_that_differ_are_said_once_and_counted() -> None:
    student, teacher, optimizer, shown = watched()
    for _ in range(2):
        with torch.no_grad():
            teacher(torch.rand(4, 1, 8, 8))
        student(torch.rand(3, 1, 8, 8)).sum().backward()
        if shown.passes["unmatched"] == 0:
            with pytest.warns(UserWarning, match=r"batch size \[3\] met teacher passes with batch size \[4\]"):
                optimizer.step()
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                optimizer.step()
    assert shown.passes == {"unmatched": 2}
    assert set(shown.rates.values()) == {1.0}


def test_a_batch_without_rows_is_counted() -> None:
    student, teacher, optimizer, shown = watched()
    student.eval()
    with torch.no_grad():
        teacher(torch.rand(0, 1, 8, 8))
    student(torch.rand(0, 1, 8, 8)).sum().backward()
    optimizer.step()
    assert shown.passes == {"empty": 1}


def test_a_teacher_in_train_mode_is_said_once() -> None:
    student, teacher, optimizer, shown = watched()
    teacher.train()
    with pytest.warns(UserWarning, match="the teacher is in train mode") as said:
        train(optimizer, student, teacher, 3)
    assert len(said) == 1
    assert shown.passes["measured"] == 3


def test_a_layer_that_was_not_executed_is_counted_and_named_where_features_are_asked_for() -> None:
    student, teacher, _, shown = watched()
    student.forward = lambda x: student.head[2](student.low(x).mean((2, 3)).repeat(1, 2))  # type: ignore[method-assign]
    with lwkd.Capture(student, teacher, shown.pairing) as capture:
        student(torch.rand(2, 1, 8, 8))
        assert shown.passes == {"incomplete": 1}
        with pytest.raises(RuntimeError, match="layer 'high' of the student gave no feature"):
            capture.student  # noqa: B018


def test_a_layer_that_stops_returning_a_tensor_is_named() -> None:
    student, _, _, _ = watched()
    student.low.forward = lambda x: "a name"  # type: ignore[method-assign]
    with pytest.raises(TypeError, match="layer 'low' returned str, expected a tensor"):
        student(torch.rand(2, 1, 8, 8))
