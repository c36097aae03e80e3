"""Passes of the library's own leave no trace in training, whatever the signal, and whether or not they fail."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from signal_runs import SIGNALS, each, noisy_nets, seed_all, tensors_alive, traces
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toy import batches, each_form, make, same, train, train_by_closures, watched, weights

import lwkd

BACKWARD = ("vjp", "jacobian of parameters", "ggn", "hessian")
"""Signals that make a backward pass through the first paired layer."""


def assert_same_traces(found: Any, expected: Any) -> None:
    assert same(found[0], expected[0])
    assert same(found[1], expected[1])
    assert all(same(one, other) for one, other in zip(found[2], expected[2], strict=True))
    assert found[3:] == expected[3:]


@each_form
@each
def test_measuring_leaves_no_trace(form: str, signal: Any) -> None:
    found, shown = traces(form, signal)
    assert shown.measurements == 3
    assert_same_traces(found, traces("bare", signal)[0])


@each_form
@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize(
    ("name", "where"), [*((name, "forward") for name in SIGNALS), *((name, "backward") for name in BACKWARD)]
)
def test_a_measurement_that_fails_leaves_no_trace(form: str, name: str, whose: str, where: str) -> None:
    signal = SIGNALS[name]

    def between(step: int, student: nn.Module, teacher: nn.Module, optimizer: Any) -> None:
        if step != 1:
            optimizer.step()
            return
        noisy = (student if whose == "student" else teacher).low
        noisy.armed = where
        with pytest.raises(RuntimeError, match="armed"):
            optimizer.step()
        noisy.armed = ""

    found, shown = traces(form, signal, between=between)
    assert shown.measurements == 2, "the update after it is measured again"
    assert_same_traces(found, traces("bare", signal)[0])


@each
def test_recomputed_layers_leave_no_trace(signal: Any) -> None:
    """Activation checkpointing runs forward passes in the middle of backward ones, on the module's own tensors."""

    class Recomputed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    student, teacher, _ = noisy_nets()
    student.high = Recomputed(student.high)
    example, layers = torch.rand(4, 1, 8, 8), {"low": "low", "high": "high"}
    pairing = lwkd.pair(student, teacher, example, layers=layers)
    before, stream = weights(student), torch.get_rng_state()
    found = signal.measure(student, teacher, pairing, example)
    student.high = student.high.inner
    plain = lwkd.pair(student, teacher, example, layers=layers)
    assert torch.equal(signal.measure(student, teacher, plain, example), found)
    student.high = Recomputed(student.high)
    assert same(weights(student), before)
    assert torch.equal(torch.get_rng_state(), stream)


@each
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_how_the_teacher_is_run_does_not_matter(signal: Any, mode: Any) -> None:
    """Inputs of a pass under inference mode can be part of a graph only as copies."""
    student, teacher, optimizer, shown = watched(signal=signal, every=1)
    expected = watched(signal=signal, every=1)
    train(expected[2], *expected[:2], 2)
    for x, y in batches(2):
        with mode():
            t = teacher(x)
        loss = lwkd.losses.distillation(student(x), t.clone(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert same(weights(student), weights(expected[0]))
    assert shown.divergences == expected[3].divergences
    assert shown.measurements == 2


@each_form
@pytest.mark.parametrize("name", ["jvp", "jacobian of parameters", "hessian", "hessian of input"])
def test_memory_is_flat(name: str, form: str) -> None:
    student, teacher, optimizer, shown = watched(form, signal=SIGNALS[name], every=1)

    train(optimizer, student, teacher, 10)
    before = tensors_alive()
    train(optimizer, student, teacher, 40)
    # Fewer is no leak: what earlier tests left behind may go at any time.
    assert all(after <= first for after, first in zip(tensors_alive(), before, strict=True))
    assert shown.measurements == 50


@each_form
@each
def test_closures(form: str, signal: Any) -> None:
    """LBFGS evaluates the closure many times an update; the last evaluation is measured, once, after the update."""

    def run(form: str) -> tuple[Any, Any, Any]:
        student, teacher, pairing = noisy_nets()
        base = torch.optim.LBFGS([p for p in student.parameters() if p.requires_grad], lr=0.1, max_iter=3)
        options = {"signal": signal, "policy": lwkd.Constant(1.0), "every": 1}
        optimizer, shown = make(form, base, student, teacher, pairing, **options)
        seed_all()
        train_by_closures(optimizer, student, teacher, batches(2))
        return weights(student), torch.get_rng_state(), shown

    (bare, stream, _), (measured, after, shown) = run("bare"), run(form)
    assert same(bare, measured)
    assert torch.equal(stream, after)
    assert shown.measurements == 2
    assert shown.passes["measured"] > 4


def test_no_seed_waits_for_gpus_not_in_use() -> None:
    """A seed that the user gave is kept for the moment at which the GPU is first used; it must stay the user's."""
    student, teacher, optimizer, _ = watched(signal=SIGNALS["jvp"], every=1)
    torch.manual_seed(3)
    waiting = list(torch.cuda._lazy_seed_tracker.get_calls())
    train(optimizer, student, teacher, 1)
    assert list(torch.cuda._lazy_seed_tracker.get_calls()) == waiting


@each_form
def test_a_bare_step_without_passes(form: str) -> None:
    student, _, optimizer, shown = watched(form, signal="jacobian", every=1)
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert (shown.measurements, set(shown.rates.values())) == (0, {1.0})


class NeedsTheLongest(nn.Module):
    """Makes its mask as long as the longest row, which must be there."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(3, width), nn.Linear(width, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return self.high(self.low(x).tanh() * mask[:, :, None]).sum(1)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors take no notes before Python 3.11")
@pytest.mark.parametrize("signal", ["jacobian", "hessian"])
def test_an_error_of_the_net_on_a_part_of_the_batch_says_what_to_do(signal: str) -> None:
    student, teacher = NeedsTheLongest(4), NeedsTheLongest(6).eval()
    x, lengths = torch.rand(8, 8, 3), torch.arange(1, 9)
    pairing = lwkd.pair(student, teacher, (x, lengths), layers={"low": "low"})
    with pytest.warns(UserWarning, match="only layer that is compared"):
        optimizer, shown = make(
            "wrapper",
            torch.optim.SGD(student.parameters(), lr=0.1),
            *(student, teacher, pairing),
            signal=signal,
            every=1,
            samples=4,
        )

    def step(x: Tensor, lengths: Tensor) -> None:
        with torch.no_grad():
            teacher(x, lengths)
        student(x, lengths).sum().backward()
        optimizer.step()

    with pytest.raises(RuntimeError, match="must match the size") as raised:
        step(x, lengths)
    assert "on the first 4 rows" in raised.value.__notes__[0]
    step(x.flip(0), lengths.flip(0))  # the longest in front
    assert shown.measurements == 1
