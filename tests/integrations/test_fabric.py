"""Lightning Fabric: pairing before or after its setup, every precision, more passes than one of a batch."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from toy import BASES, batches, moving, nets, same, train, weights

import lwkd

fabrics = pytest.importorskip("lightning.fabric")
logging.getLogger("lightning.fabric").setLevel(logging.ERROR)


def run(precision: str, passes: int, **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """What the wrapper shows, and the student's weights, after three batches."""
    fabric = fabrics.Fabric(accelerator="cpu", devices=1, precision=precision)
    student, teacher, pairing = nets()
    whole, optimizer = fabric.setup(student, BASES["sgd"](student.parameters()))
    other = fabric.setup_module(teacher)
    policy = moving(options.get("signal", "attention"))
    shown = lwkd.attach(optimizer.optimizer, whole, other, pairing, policy=policy, **options)
    for x, y in batches(3):
        with torch.no_grad():
            t = other(x)
        loss = sum(lwkd.losses.distillation(whole(x), t, y) for _ in range(passes)) / passes
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
    return shown, weights(student)


@pytest.mark.parametrize("signal", ["attention", "jacobian", "hessian"])
def test_a_run_is_that_of_a_plain_loop(signal: str) -> None:
    student, teacher, pairing = nets()
    options = {"policy": moving(signal), "signal": signal, "every": 1}
    plain = lwkd.LayerwiseOptimizer(BASES["sgd"](student.parameters()), student, teacher, pairing, **options)
    train(plain, student, teacher)
    shown, found = run("32-true", 1, signal=signal, every=1)
    assert same(found, weights(student))
    assert shown.rates == plain.rates
    assert set(shown.rates) == {"low", "high"}


@pytest.mark.parametrize(
    ("precision", "signal"),
    [
        *((precision, signal) for precision in ("bf16-mixed", "bf16-true") for signal in ("attention", "jacobian")),
        ("bf16-mixed", "hessian"),
        ("64-true", "attention"),
    ],
)
def test_both_passes_of_a_batch_are_compared_in_every_precision(precision: str, signal: str) -> None:
    """Fabric gives each net an input of its own in these; lwkd sees what Fabric was given."""
    expected, _ = run("32-true", 2, signal=signal, every=1)
    shown, _ = run(precision, 2, signal=signal, every=1)
    assert shown.passes == {"measured": 6}
    assert shown.divergences == pytest.approx(expected.divergences, rel=0.05)


def test_pairs_have_the_same_names_behind_its_setup() -> None:
    student, teacher, pairing = nets()
    fabric = fabrics.Fabric(accelerator="cpu", devices=1)
    whole, other = fabric.setup_module(student), fabric.setup_module(teacher)
    found = lwkd.pair(whole, other, torch.rand(1, 1, 8, 8), layers={"low": "low", "high": "high"})
    assert found == pairing
