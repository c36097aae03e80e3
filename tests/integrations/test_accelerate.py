"""Accelerate as it is: prepared before or after lwkd, accumulation, a GradScaler, and its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_runs import on_ranks
from saved_runs import assert_continues
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from toy import BASES, FORMS, batches, make, moving, nets, watched

import lwkd

accelerate = pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState  # noqa: E402

STEPS = 6


@pytest.fixture
def fresh() -> Iterator[type[Any]]:
    """Accelerators share a state, which is empty before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator
    AcceleratorState._reset_state(reset_partial_state=True)


def loss_of(student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        target = teacher(x)
    logits = student(x)
    return F.cross_entropy(logits, y) + F.mse_loss(logits, target)


def halving(optimizer: Any) -> torch.optim.lr_scheduler.StepLR:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


CLIP = 0.05


def by_hand(
    passes: int = 1, *, skipped: int | None = None, clipped: bool = False
) -> tuple[list[Tensor], dict[str, float]]:
    """Parameters and rates of a plain loop: so many passes an update, without the update of this number.

    ``clipped`` is with clipping, and a scheduler.
    """
    student, teacher, optimizer, _ = watched()
    scheduler = halving(optimizer)
    for number, (x, y) in enumerate(batches(STEPS)):
        (loss_of(student, teacher, x, y) / passes).backward()
        if (number + 1) % passes:
            continue
        if clipped:
            norm = nn.utils.clip_grad_norm_(student.parameters(), CLIP)
            assert norm > CLIP, "this test cannot fail"
        if number != skipped:
            optimizer.step()
        if clipped:
            scheduler.step()
        optimizer.zero_grad()
    return [p.detach() for p in student.parameters()], optimizer.rates


def given(how: str, base: Any, prepared: Any, student: nn.Module, teacher: nn.Module, pairing: lwkd.Pairing) -> Any:
    """What is stepped, and what shows the rates."""
    if how == "wrapper of what was prepared":
        return (lwkd.LayerwiseOptimizer(prepared, student, teacher, pairing, policy=moving()),) * 2
    own = prepared if how == "attach to what was prepared" else base
    return prepared, lwkd.attach(own, student, teacher, pairing, policy=moving())


BEFORE = {"wrapper before": "wrapper", "attach before": "attach"}
AFTER = ("wrapper of what was prepared", "attach to what was prepared", "attach to the base")


@pytest.mark.parametrize("clipped", [False, True], ids=["plain", "clipped"])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("how", [*AFTER, "wrapper before", "attach before"])
def test_updates_are_those_of_a_plain_loop(fresh: Any, how: str, passes: int, clipped: bool) -> None:
    expected, rates = by_hand(passes, clipped=clipped)
    accelerator = fresh(cpu=True, gradient_accumulation_steps=passes)
    student, teacher, pairing = nets()
    base = BASES["sgd"](student.parameters())
    if how in BEFORE:
        stepped, shown = make(BEFORE[how], base, student, teacher, pairing)
        student, stepped, scheduler = accelerator.prepare(student, stepped, halving(stepped))
    else:
        student, prepared, scheduler = accelerator.prepare(student, base, halving(base))
        stepped, shown = given(how, base, prepared, student, teacher, pairing)
    for x, y in batches(STEPS):
        with accelerator.accumulate(student):
            accelerator.backward(loss_of(student, teacher, x, y))
            if clipped and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(student.parameters(), CLIP)
            stepped.step()
            if clipped:
                scheduler.step()
            stepped.zero_grad()
    assert base.param_groups[0]["lr"] == 0.05 * 0.5 ** (clipped * STEPS // passes // 2)
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


def _rank(rank: int, folder: str) -> dict[str, list[Any]]:
    """Rates, parameters and measurements of a run, and of another that begins with what it saved on its way."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(number) for name, number in told.items()})
    data = list(batches(2 * STEPS, seed=rank))
    found = {}
    for form in FORMS:
        for part in ("whole", "resumed"):
            AcceleratorState._reset_state(reset_partial_state=True)
            accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
            student, teacher, pairing = nets()
            stepped, shown = make(form, BASES["sgd"](student.parameters()), student, teacher, pairing)
            called, stepped, scheduler = accelerator.prepare(student, stepped, halving(stepped))
            assert isinstance(called, DistributedDataParallel)
            if form == "attach":
                accelerator.register_for_checkpointing(shown.rate_state)
            if part == "resumed":
                accelerator.load_state(f"{folder}/{form}")
            for number, (x, y) in enumerate(data):
                if part == "resumed" and number < STEPS:
                    continue
                if part == "whole" and number == STEPS:
                    accelerator.save_state(f"{folder}/{form}")
                with accelerator.accumulate(called):
                    accelerator.backward(loss_of(called, teacher, x, y))
                    accelerator.clip_grad_norm_(called.parameters(), CLIP)
                    stepped.step()
                    scheduler.step()
                    stepped.zero_grad()
            parameters = [p.detach().clone() for p in student.parameters()]
            found[f"{form}, {part}"] = [shown.rates, parameters, shown.measurements]
    return found


def test_two_ranks_hold_the_same_rates_and_continue_bitwise(tmp_path: Path) -> None:
    one, other = on_ranks(_rank, tmp_path, str(tmp_path))
    expected, parameters, _ = one["wrapper, whole"]
    assert set(expected.values()) != {1.0}
    for found in (*one.values(), *other.values()):
        assert found[0] == expected
        assert all(map(torch.equal, found[1], parameters))
        assert found[2] == STEPS


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
