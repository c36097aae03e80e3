"""The wrapper against the bare optimizer: schedulers, groups, closures, hooks, decay. Both forms of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from optimizer_doubles import Breaks
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR
from toy import BASES, batches, each_form, loss_of, make, nets, same, train, train_on, watched, weights

import lwkd

base = pytest.mark.parametrize("base", BASES)

SCHEDULERS: dict[str, Any] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.1, 2),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 1 / k),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=4, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=20),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "SWALR": lambda o: SWALR(o, swa_lr=0.02),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


def _scheduled(optimizer: torch.optim.Optimizer, scheduler: Any, student: nn.Module, teacher: nn.Module) -> list[float]:
    seen = []
    for batch in batches(6):
        train_on(optimizer, student, teacher, [batch])
        scheduler.step(1.0) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else scheduler.step()
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


@each_form
@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_scheduled_rate_is_the_bare_optimizers(form: str, schedule: str) -> None:
    trajectories = []
    for policy in (None, lwkd.Constant([2.0, 0.5])):
        student, teacher, optimizer, _ = watched("bare" if policy is None else form, policy=policy)
        assert isinstance(optimizer, torch.optim.Optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a scheduler that mistrusts the order of calls warns
            if schedule == "SequentialLR":  # torch warns about itself here, with the bare optimizer too
                warnings.simplefilter("ignore")
            trajectories.append(_scheduled(optimizer, SCHEDULERS[schedule](optimizer), student, teacher))
    assert trajectories[0] == trajectories[1]


def test_no_scheduler_of_torch_is_left_out() -> None:
    of_torch = set(lr_scheduler.__all__) - {"LRScheduler"}
    assert of_torch | {"SWALR"} == SCHEDULERS.keys()


@each_form
@base
def test_multipliers_of_one_change_no_bit(form: str, base: str) -> None:
    results = []
    for how in ("bare", form):
        made = partial(BASES[base], weight_decay=0.01)
        student, teacher, optimizer, _ = watched(how, made, policy=lwkd.Constant(1.0))
        train(optimizer, student, teacher)
        results.append(weights(student))
    assert same(*results)


@each_form
@base
def test_rates_equal_explicit_groups_bitwise(form: str, base: str) -> None:
    multipliers = {"low": 1.5, "high": 0.5, "head": 1.0}
    student, teacher, _ = nets()
    groups = [
        {
            "params": list(getattr(student, name).parameters()),
            "lr": BASES[base](student.parameters()).defaults["lr"] * m,
        }
        for name, m in multipliers.items()
    ]
    train(BASES[base](groups, weight_decay=0.01), student, teacher)
    expected = weights(student)

    made = partial(BASES[base], weight_decay=0.01)
    student, teacher, optimizer, _ = watched(form, made, policy=lwkd.Constant([1.5, 0.5]))
    train(optimizer, student, teacher)
    assert same(weights(student), expected)


@each_form
def test_measured_rates_act_one_update_later(form: str) -> None:
    student, teacher, pairing = nets()
    optimizer, shown = make(form, BASES["sgd"](student.parameters()), student, teacher, pairing)
    x, y = next(batches(1))
    features: list[list[torch.Tensor]] = []
    with lwkd.Capture(student, teacher, pairing) as capture:
        loss = loss_of(student, teacher, x, y)
        features = [[f.detach() for f in capture.student], capture.teacher]
    loss.backward()
    bare_student = copy.deepcopy(student)
    for mine, original in zip(bare_student.parameters(), student.parameters(), strict=True):
        mine.grad = original.grad.clone()
    bare = BASES["sgd"](bare_student.parameters())
    bare.step()
    assert set(shown.rates.values()) == {1.0}
    optimizer.step()
    assert same(weights(student), weights(bare_student)), "update 0 uses rate 1"
    divergences = lwkd.reference.attention_divergence(*features)
    expected = (divergences / divergences.mean()).clamp(0.5, 1.5)
    assert list(shown.rates) == ["low", "high"]
    torch.testing.assert_close(torch.tensor(list(shown.rates.values())), expected)
    torch.testing.assert_close(torch.tensor(list(shown.divergences.values())), divergences)


@each_form
def test_groups_are_restored_when_the_step_raises(form: str) -> None:
    student, teacher, optimizer, _ = watched(form, partial(Breaks, lr=0.05), policy=lwkd.Constant([2.0, 0.5]))
    group, count = optimizer.param_groups[0], len(optimizer.param_groups[0]["params"])
    loss_of(student, teacher, *next(batches(1))).backward()
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert optimizer.param_groups == [group]
    assert optimizer.param_groups[0] is group
    assert (group["lr"], len(group["params"])) == (0.05, count)


@pytest.mark.parametrize(("signal", "momentum"), [("attention", 0.9), ("jacobian", 0.7), ("hessian", 0.7)])
def test_the_default_policy_is_local_with_the_signals_momentum(signal: str, momentum: float) -> None:
    student, teacher, pairing = nets()
    optimizer = lwkd.LayerwiseOptimizer(BASES["sgd"](student.parameters()), student, teacher, pairing, signal=signal)
    assert optimizer._rates.policy == lwkd.Local(momentum=momentum)


def test_by_default_the_layer_that_a_copy_lost_moves_and_the_one_before_stands_still() -> None:
    _, teacher, _ = nets()
    teacher[0][1], teacher[1][1] = nn.Identity(), nn.Identity()  # in train mode a batch norm makes another feature
    copied = copy.deepcopy(teacher).train()
    nn.init.normal_(copied[1][0].weight)
    pairing = lwkd.pair(copied, teacher, torch.rand(1, 1, 8, 8), layers={"low": "low", "high": "high"})
    optimizer = lwkd.LayerwiseOptimizer(BASES["sgd"](copied.parameters(), lr=0.0), copied, teacher, pairing)
    train(optimizer, copied, teacher, 3)
    assert optimizer.rates == pytest.approx({"low": 0.1, "high": 10.0})


@each_form
@pytest.mark.parametrize("base", ["sgd_foreach", "sgd_fused", "adamw_fused"])
def test_a_tensor_rate_stays_the_same_object(form: str, base: str) -> None:
    rate = torch.tensor(0.05)
    made = partial(BASES[base], lr=rate)
    student, teacher, optimizer, _ = watched(form, made, policy=lwkd.Constant([2.0, 0.5]))
    train(optimizer, student, teacher)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.05)


@each_form
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(form: str, set_to_none: bool) -> None:
    student, teacher, optimizer, _ = watched(form)
    train(optimizer, student, teacher, 1)
    optimizer.zero_grad(set_to_none=set_to_none)
    if set_to_none:
        assert all(p.grad is None for p in student.parameters())
    else:
        assert all(p.grad is not None and not p.grad.any() for p in student.parameters())


@each_form
def test_decoupled_weight_decay_scales_with_the_rate(form: str) -> None:
    base = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5)
    student, _, optimizer, _ = watched(form, base, policy=lwkd.Constant([2.0, 0.5]))
    before = weights(student)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)  # what is left of AdamW is the decay
    optimizer.step()
    after = weights(student)
    for layer, multiplier in (("low", 2.0), ("high", 0.5), ("head", 1.0)):
        name = f"{layer}.{2 if layer == 'head' else 0}.weight"
        torch.testing.assert_close(after[name], before[name] * (1 - 0.1 * multiplier * 0.5))


@each_form
def test_clipping_sees_the_gradients_and_only_them(form: str) -> None:
    results = []
    for how in ("bare", form):
        student, teacher, optimizer, _ = watched(how, policy=lwkd.Constant(1.0))
        for x, y in batches(3):
            optimizer.zero_grad()
            loss_of(student, teacher, x, y).backward()
            norm = nn.utils.clip_grad_norm_(student.parameters(), 0.1)
            optimizer.step()
        results.append({**weights(student), "norm": norm})
    assert same(*results)


def _scaled_steps(
    optimizer: Any, student: nn.Module, teacher: nn.Module, unscaled: bool, **options: float
) -> Iterator[tuple[bool, Any]]:
    """Steps of a GradScaler, every other one skipped: whether this one was, and the scaler."""
    scaler = torch.amp.GradScaler("cpu", **options)
    for (x, y), infinite in zip(batches(4), (False, True, False, True), strict=True):
        optimizer.zero_grad()
        scaler.scale(loss_of(student, teacher, x, y)).backward()
        if infinite:
            next(student.parameters()).grad.fill_(float("inf"))
        if unscaled:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(student.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        yield infinite, scaler


unscaled = pytest.mark.parametrize("unscaled", [False, True])
scaled_base = pytest.mark.parametrize("base", ["sgd", "sgd_fused", "adamw", "adamw_fused"])


@each_form
@unscaled
@scaled_base
def test_a_skipped_step_of_the_grad_scaler_advances_nothing(form: str, base: str, unscaled: bool) -> None:
    student, teacher, optimizer, shown = watched(form, BASES[base])
    updates, before, divergences = 0, weights(student), shown.divergences
    for infinite, _ in _scaled_steps(optimizer, student, teacher, unscaled, init_scale=4.0):
        updates += not infinite
        assert torch.equal(before["low.0.weight"], student.low[0].weight) is infinite
        assert (shown.divergences == divergences) is infinite
        assert shown.updates == updates
        before, divergences = weights(student), shown.divergences


@each_form
@unscaled
@scaled_base
def test_multipliers_of_one_change_no_bit_under_a_grad_scaler(form: str, base: str, unscaled: bool) -> None:
    """The scale is so large that gradients which were divided by it twice, or not at all, would be seen."""
    results = []
    for how in ("bare", form):
        student, teacher, optimizer, _ = watched(how, BASES[base], policy=lwkd.Constant(1.0))
        scales = [s.get_scale() for _, s in _scaled_steps(optimizer, student, teacher, unscaled, init_scale=2.0**14)]
        results.append((weights(student), scales))
    assert results[0][1] == results[1][1] == [2.0**14, 2.0**13, 2.0**13, 2.0**12]
    assert same(results[0][0], results[1][0])


def test_what_cannot_be_wrapped_is_named() -> None:
    student, teacher, pairing = nets()
    other, *_ = nets(1)
    with pytest.raises(TypeError, match=r"optimizer is a Sequential; expected a torch\.optim\.Optimizer"):
        lwkd.LayerwiseOptimizer(student, student, teacher, pairing)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="none of the optimizer's parameters belongs"):
        lwkd.LayerwiseOptimizer(BASES["sgd"](other.parameters()), student, teacher, pairing)
    for options, message in (
        ({"signal": "gradients"}, "signal is 'gradients'; expected 'attention'"),
        ({"every": 0}, "every is 0; expected a whole number"),
        ({"samples": 1.5}, "samples is 1.5; expected a whole number"),
        ({"policy": lwkd.Constant([1.0])}, "Constant has 1 multipliers, the pairing has 2 layers"),
    ):
        with pytest.raises(ValueError, match=message):
            lwkd.LayerwiseOptimizer(BASES["sgd"](student.parameters()), student, teacher, pairing, **options)
    optimizer = BASES["sgd"](student.parameters())
    lwkd.attach(optimizer, student, teacher, pairing)
    with pytest.raises(ValueError, match="attached already"):
        lwkd.attach(optimizer, student, teacher, pairing)


def test_detach_gives_the_optimizer_back() -> None:
    student, teacher, pairing = nets()
    optimizer = BASES["sgd"](student.parameters())
    before = optimizer.step
    handle = lwkd.attach(optimizer, student, teacher, pairing, policy=lwkd.Constant([2.0, 0.5]))
    handle.detach()
    assert optimizer.step == before
    assert not any(m._forward_hooks for net in (student, teacher) for m in net.modules())
    handle = lwkd.attach(optimizer, student, teacher, pairing, policy=lwkd.Constant([0.0, 0.0]))
    scheduler = lr_scheduler.ConstantLR(optimizer)  # patches over ours
    handle.detach()
    frozen = student.low[0].weight.clone()
    train(optimizer, student, teacher, 1)
    scheduler.step()
    assert not torch.equal(student.low[0].weight, frozen), "a detached handle no longer scales"
