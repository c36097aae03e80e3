"""Nets with activation checkpointing: measured as they are without it, by every signal; the training's own goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from toy import Parts, loss_of, make, net, nets

import lwkd
from lwkd.signals import Hessian, Jacobian

SIGNALS = (
    Jacobian(),
    Jacobian(estimator="difference"),
    Jacobian(estimator="vjp"),
    Jacobian(estimator="output"),
    Jacobian("parameters"),
    Hessian(),
    Hessian(curvature="hessian"),
    Hessian("input"),
)


class Checkpointed(Parts):
    """The stages, whose passes in train mode are made again in the backward pass."""

    calls = 0

    def __init__(self, reentrant: bool) -> None:
        super().__init__(net(3))
        self.reentrant = reentrant
        self.high[1].eval()  # a batch norm that counted twice would say nothing of the gradients

    def forward(self, x: Tensor) -> Tensor:
        def high(x: Tensor) -> Tensor:
            self.calls += 1
            return self.high(x)

        if not self.training:
            return self.head(high(self.low(x)))
        return self.head(checkpoint(high, self.low(x), use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("signal", SIGNALS, ids=repr)
def test_every_signal_measures_what_it_does_without(signal: Any, reentrant: bool) -> None:
    found, x = [], torch.rand(4, 1, 8, 8)
    for checkpoints in (False, True):
        _, teacher, _ = nets()
        torch.manual_seed(1)
        student = Checkpointed(reentrant)
        pairing = lwkd.pair(student, teacher, x, layers={"low": "low", "high": "high"})
        student.low.eval()
        student.training = checkpoints
        found.append(signal.measure(student, teacher, pairing, x, seed=3))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=0)


class Always(Checkpointed):
    """Checkpointed in every mode."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.high, self.low(x), use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_pairing_looks_inside(reentrant: bool) -> None:
    _, teacher, pairing = nets()
    assert lwkd.pair(Always(reentrant), teacher, torch.rand(1, 1, 8, 8)).student_layers == pairing.student_layers


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_goes_on_with_its_own(reentrant: bool) -> None:
    _, teacher, _ = nets()
    student, x = Checkpointed(reentrant), torch.rand(4, 1, 8, 8)
    pairing = lwkd.pair(student, teacher, x, layers={"low": "low", "high": "high"})
    optimizer, shown = make(
        "wrapper", torch.optim.SGD(student.parameters(), lr=0.01), student, teacher, pairing, signal="jacobian", every=1
    )
    for step in range(3):
        loss = loss_of(student, teacher, x, torch.zeros(4, dtype=torch.int64))
        before = student.calls
        loss.backward()
        assert student.calls == before + 1, step
        optimizer.step()
    assert shown.measurements == 3
