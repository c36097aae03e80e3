"""Accelerate as it is: prepared before or after lwkd, accumulation, a GradScaler, and its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from saved_runs import assert_continues
from torch import Tensor, nn
from torch.nn import functional as F
from toy import BASES, FORMS, batches, moving, nets, watched

import lwkd

accelerate = pytest.importorskip("accelerate")

STEPS = 6


@pytest.fixture
def fresh() -> Iterator[type[Any]]:
    """Accelerators share a state, which is empty before and after."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator
    AcceleratorState._reset_state(reset_partial_state=True)


def loss_of(student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        target = teacher(x)
    logits = student(x)
    return F.cross_entropy(logits, y) + F.mse_loss(logits, target)


def by_hand(passes: int = 1, skipped: int | None = None) -> tuple[list[Tensor], dict[str, float]]:
    """Parameters and rates of a plain loop: so many passes an update, without the update of this number."""
    student, teacher, optimizer, _ = watched()
    for number, (x, y) in enumerate(batches(STEPS)):
        (loss_of(student, teacher, x, y) / passes).backward()
        if (number + 1) % passes == 0 and number != skipped:
            optimizer.step()
        if (number + 1) % passes == 0:
            optimizer.zero_grad()
    return [p.detach() for p in student.parameters()], optimizer.rates


def given(how: str, base: Any, prepared: Any, student: nn.Module, teacher: nn.Module, pairing: lwkd.Pairing) -> Any:
    """What is stepped, and what shows the rates."""
    if how == "wrapper of what was prepared":
        return (lwkd.LayerwiseOptimizer(prepared, student, teacher, pairing, policy=moving()),) * 2
    own = prepared if how == "attach to what was prepared" else base
    return prepared, lwkd.attach(own, student, teacher, pairing, policy=moving())


AFTER = ("wrapper of what was prepared", "attach to what was prepared", "attach to the base")


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("how", [*AFTER, "wrapper before"])
def test_updates_are_those_of_a_plain_loop(fresh: Any, how: str, passes: int) -> None:
    expected, rates = by_hand(passes)
    accelerator = fresh(cpu=True, gradient_accumulation_steps=passes)
    student, teacher, pairing = nets()
    base = BASES["sgd"](student.parameters())
    if how == "wrapper before":
        shown = lwkd.LayerwiseOptimizer(base, student, teacher, pairing, policy=moving())
        student, stepped = accelerator.prepare(student, shown)
    else:
        student, prepared = accelerator.prepare(student, base)
        stepped, shown = given(how, base, prepared, student, teacher, pairing)
    for x, y in batches(STEPS):
        with accelerator.accumulate(student):
            accelerator.backward(loss_of(student, teacher, x, y))
            stepped.step()
            stepped.zero_grad()
    assert shown.rates == rates
    assert shown.measurements == STEPS // passes
    for mine, theirs in zip(student.parameters(), expected, strict=True):
        torch.testing.assert_close(mine.detach(), theirs, rtol=0, atol=0)


@pytest.mark.parametrize("how", AFTER)
def test_an_optimizer_with_a_scaler_keeps_the_step_it_first_saw_and_is_scaled_all_the_same(
    fresh: Any, how: str
) -> None:
    from accelerate.optimizer import AcceleratedOptimizer

    expected, rates = by_hand(skipped=2)
    fresh(cpu=True)
    student, teacher, pairing = nets()
    base = BASES["sgd"](student.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    prepared = AcceleratedOptimizer(base, scaler=scaler)
    stepped, shown = given(how, base, prepared, student, teacher, pairing)
    for number, (x, y) in enumerate(batches(STEPS)):
        scaler.scale(loss_of(student, teacher, x, y)).backward()
        if number == 2:
            next(student.parameters()).grad.fill_(torch.inf)
        stepped.step()
        assert prepared.step_was_skipped == (number == 2)
        stepped.zero_grad()
    assert shown.measurements == STEPS - 1
    assert shown.rates == pytest.approx(rates, rel=1e-6)
    for mine, theirs in zip(student.parameters(), expected, strict=True):
        torch.testing.assert_close(mine.detach(), theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_its_checkpoint_continues_bitwise(fresh: Any, form: str, tmp_path: Any) -> None:
    def run(steps: range, *, load: bool = False, save: bool = False) -> tuple[list[Tensor], dict[str, float]]:
        accelerator = fresh(cpu=True)
        student, teacher, stepped, shown = watched(form)
        student, stepped = accelerator.prepare(student, stepped)
        if form == "attach":
            accelerator.register_for_checkpointing(shown.rate_state)
        if load:
            accelerator.load_state(tmp_path / "state")
        for x, y in list(batches(STEPS))[steps.start : steps.stop]:
            accelerator.backward(loss_of(student, teacher, x, y))
            stepped.step()
            stepped.zero_grad()
        if save:
            accelerator.save_state(tmp_path / "state")
        return [p.detach().clone() for p in student.parameters()], shown.rates

    assert_continues(run, STEPS)


def test_a_closed_wrapper_scales_its_own_steps_and_leaves_the_base_alone(fresh: Any) -> None:
    accelerator = fresh(cpu=True)
    student, teacher, pairing = nets()
    base = torch.optim.SGD(student.parameters(), lr=1.0)
    student, prepared = accelerator.prepare(student, base)
    wrapper = lwkd.LayerwiseOptimizer(prepared, student, teacher, pairing, policy=lwkd.Constant([0.5, 2.0]))
    wrapper.close()
    weight = student.low[0].weight
    for stepped, expected in ((wrapper, 0.5), (prepared, 1.0), (base, 1.0)):
        before, weight.grad = weight.detach().clone(), torch.ones_like(weight)
        stepped.step()
        torch.testing.assert_close(before - weight.detach(), torch.full_like(before, expected))
