"""Rates that stay beside tensor learning rates: the same rates and weights, the same objects, and nothing read."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from doubles import OnCuda, copies_deferred, resident, staying_on_the_device, unread
from doubles import held_tensors as tensors
from optimizer_doubles import Breaks, SeesGroups, WritesRate
from saved_runs import resume, saved
from signal_runs import SIGNALS
from torch.optim import lr_scheduler
from toy import BASES, batches, each_form, loss_of, make, nets, same, train, train_on, watched, weights

import lwkd
from lwkd.optimizer.lr_scaling import why_on_host

base = pytest.mark.parametrize("base", ["sgd_fused", "adamw_fused"])
ALL: dict[str, Any] = {"attention": "attention", "jvp": SIGNALS["jvp"], "ggn": SIGNALS["ggn"]}


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    staying_on_the_device(monkeypatch)


@each_form
@base
@pytest.mark.parametrize("signal", ALL.values(), ids=ALL)
@pytest.mark.parametrize("policy", [None, lwkd.Decay(momentum=0.5), lwkd.Relative(normalize=True)])
def test_the_same_bits_as_with_rates_on_the_host(form: str, base: str, signal: Any, policy: Any) -> None:
    found = []
    for there in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if there:
                staying_on_the_device(patch)
            student, teacher, optimizer, shown, rate = resident(form, base, signal=signal, policy=policy, every=1)
            train(optimizer, student, teacher, 20)
            assert (shown._rates.store.mode != "host") == there
            assert (shown._rates.store.mode == "device") == (there and signal == "attention")
            assert optimizer.param_groups[0]["lr"] is rate
            found.append((weights(student), shown.rates, shown.divergences, str(shown.standard_errors), shown.skipped))
    assert same(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]
    assert len(set(found[0][1].values())) > 1


@base
def test_within_rounding_of_float_learning_rates(base: str, on_device: None) -> None:
    student, teacher, optimizer, shown, _ = resident(base=base)
    train(optimizer, student, teacher, 20)
    other, teacher, plain, plain_shown = watched("wrapper", partial(BASES[base], lr=0.02))
    train(plain, other, teacher, 20)
    for (name, one), two in zip(student.named_parameters(), other.parameters(), strict=True):
        # A batch norm takes the bias of a convolution away again: its gradient is rounding, and Adam makes that large.
        if name not in ("low.0.bias", "high.0.bias"):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert shown.rates == pytest.approx(plain_shown.rates, rel=1e-3)


@each_form
@base
def test_a_step_reads_nothing_and_replaces_nothing(form: str, base: str, on_device: None) -> None:
    student, teacher, optimizer, shown, rate = resident(form, base)
    held = tensors(shown)
    for x, y in batches(4):
        optimizer.zero_grad()
        loss_of(student, teacher, x, y).backward()
        with unread():
            optimizer.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.02)
    assert tensors(shown) == held
    assert shown.measurements == 4
    assert set(shown.rates.values()) != {1.0}


@pytest.mark.parametrize("signal", [ALL["jvp"], ALL["ggn"]], ids=["jvp", "ggn"])
def test_rates_found_on_the_host_arrive_in_the_same_tensors(signal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    staying_on_the_device(monkeypatch)
    log = copies_deferred(monkeypatch)
    student, teacher, optimizer, shown, _ = resident(signal=signal, every=1)
    held = tensors(shown)
    train(optimizer, student, teacher, 3)
    assert log == ["launched", "read", "launched", "read", "launched"]
    assert tensors(shown) == held
    multipliers = shown._rates.store._on_device.multipliers
    before = multipliers.tolist()
    assert before != [1.0, 1.0]
    assert list(shown.rates.values()) == multipliers.tolist() != before


@each_form
def test_groups_by_layer_and_the_users_own_tensor_for_the_rest(form: str, on_device: None) -> None:
    student, teacher, pairing = nets()
    one, other = torch.tensor(0.1, dtype=torch.float64), torch.tensor([0.2])
    norm = list(student.low[1].parameters())
    rest = [p for p in student.parameters() if not any(p is n for n in norm)]
    groups = [{"params": rest, "lr": one}, {"params": norm, "lr": other}]
    made = SeesGroups(groups, lr=0.5)
    optimizer, _ = make(form, made, student, teacher, pairing, policy=lwkd.Constant([1.5, 1.5]))
    train(optimizer, student, teacher, 1)
    seen = [made.seen[id(p)] for p in (student.low[0].weight, student.high[0].weight, norm[0], student.head[2].weight)]
    assert [(t.dtype, tuple(t.shape)) for t in seen[:3]] == [(torch.float64, ())] * 2 + [(torch.float32, (1,))]
    assert [float(t) for t in seen[:3]] == pytest.approx([0.15, 0.15, 0.3])
    assert seen[0].data_ptr() != seen[1].data_ptr(), "layers of equal multiplier stay apart: nobody knows that they are"
    assert seen[0].untyped_storage().data_ptr() == seen[1].untyped_storage().data_ptr(), "one multiplication a group"
    assert seen[3] is one
    assert [group["lr"] for group in optimizer.param_groups] == [one, other]


@each_form
@pytest.mark.parametrize("multipliers", [[1.5, 0.5], [0.0, 0.5], [0.0, 0.0]])
def test_a_rate_that_the_base_writes_is_kept_unscaled(form: str, multipliers: list[float], on_device: None) -> None:
    rate = torch.tensor(0.8)
    base = partial(WritesRate, lr=rate)
    student, teacher, optimizer, _ = watched(form, base, policy=lwkd.Constant(multipliers))
    train(optimizer, student, teacher, 2)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.2)


@each_form
def test_groups_are_restored_when_the_step_raises(form: str, on_device: None) -> None:
    rate = torch.tensor(0.8)
    student, teacher, optimizer, _ = watched(form, partial(Breaks, lr=rate))
    group = optimizer.param_groups[0]
    loss_of(student, teacher, *next(batches(1))).backward()
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert optimizer.param_groups == [group]
    assert group["lr"] is rate


@each_form
def test_a_scheduler_writes_into_the_users_tensor(form: str, on_device: None) -> None:
    student, teacher, optimizer, _, rate = resident(form)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    for x, y in batches(3):
        loss_of(student, teacher, x, y).backward()
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.02 / 8)


@each_form
@base
@pytest.mark.parametrize("there", [(True, True), (True, False), (False, True)], ids=["both", "saved", "loaded"])
def test_resume_is_bitwise_wherever_the_rates_were(form: str, base: str, there: tuple[bool, bool]) -> None:
    data = list(batches(6))
    with pytest.MonkeyPatch.context() as patch:
        if there[0]:
            staying_on_the_device(patch)
        student, teacher, optimizer, shown, _ = resident(form, base)
        train_on(optimizer, student, teacher, data[:3])
        state = saved(student, optimizer, shown)
        train_on(optimizer, student, teacher, data[3:])
    with pytest.MonkeyPatch.context() as patch:
        if there[1]:
            staying_on_the_device(patch)
        again, teacher, optimizer, resumed, _ = resident(form, base)
        held = tensors(resumed) if there[1] else None
        resume(state, again, optimizer, resumed)
        assert resumed.rates
        train_on(optimizer, again, teacher, data[3:])
        assert held is None or tensors(resumed) == held
    assert same(weights(again), weights(student))
    assert resumed.rates == shown.rates
    assert len(set(shown.rates.values())) > 1


@each_form
def test_rates_move_with_the_learning_rate_and_back_into_the_same_tensors(form: str, on_device: None) -> None:
    """As when torch makes its step of zero length with a learning rate of its own for a distributed checkpoint."""
    student, teacher, optimizer, shown, rate = resident(form)
    held = tensors(shown)
    train(optimizer, student, teacher, 2)
    rates = shown.rates
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.zero_grad()
    optimizer.step()
    assert shown._rates.store.mode != "device"
    assert shown.rates == rates
    optimizer.param_groups[0]["lr"] = rate
    train(optimizer, student, teacher, 1)
    assert shown._rates.store.mode == "device"
    assert shown.measurements == 3
    assert tensors(shown) == held


@each_form
@pytest.mark.parametrize("signal", ["attention", "jacobian"])
def test_infinite_gradients_mask_the_measurement(form: str, signal: str, on_device: None) -> None:
    student, teacher, optimizer, shown, _ = resident(form, "adamw_fused", signal=signal, every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    measured = 0
    for (x, y), infinite in zip(batches(4), (False, True, False, True), strict=True):
        before, rates, divergences = weights(student), shown.rates, shown.divergences
        optimizer.zero_grad()
        scaler.scale(loss_of(student, teacher, x, y)).backward()
        if infinite:
            next(student.parameters()).grad.fill_(float("inf"))
        with unread() if signal == "attention" else nullcontext():  # neither does the scaler read anything then
            scaler.step(optimizer)
        scaler.update()
        measured += not infinite
        assert torch.equal(before["low.0.weight"], student.low[0].weight) is infinite
        assert ((shown.rates, shown.divergences) == (rates, divergences)) is infinite
        assert (shown.measurements, shown.skipped) == (measured, 0)


@each_form
def test_a_measurement_that_is_not_finite_is_counted(form: str, on_device: None) -> None:
    student, teacher, optimizer, shown, _ = resident(form)
    train(optimizer, student, teacher, 2)
    rates = shown.rates
    handle = teacher.high.register_forward_hook(lambda _m, _a, out: out * float("nan"), prepend=True)
    loss_of(student, teacher, *next(batches(1)))
    handle.remove()
    optimizer.zero_grad()
    optimizer.step()
    assert (shown.skipped, shown.rates) == (1, rates)


def test_copies_have_tensors_of_their_own(on_device: None) -> None:
    student, teacher, optimizer, shown, _ = resident()
    train(optimizer, student, teacher, 2)
    copied_student, copied = copy.deepcopy((student, optimizer))
    copied.watch(copied_student, teacher)
    optimizer.close()
    assert not set(tensors(copied)) & set(tensors(shown))
    train(copied, copied_student, teacher, 2, seed=5)
    copied.close()
    optimizer.watch(student, teacher)
    train(optimizer, student, teacher, 2, seed=5)
    assert same(weights(student), weights(copied_student))
    assert copied.rates == shown.rates


@each_form
def test_a_budget(form: str, on_device: None) -> None:
    student, teacher, optimizer, shown, _ = resident(form, budget=0.5)
    train(optimizer, student, teacher, 12)
    assert shown._rates.schedule.calibrated
    assert 0 < shown.overhead() < float("inf")


CUDA = torch.device("cuda", 0)


def test_where_rates_stay_on_the_device() -> None:
    there = torch.tensor(0.1).as_subclass(OnCuda)
    good = [{"lr": there, "fused": True}, {"lr": there, "fused": None, "capturable": True}]
    assert why_on_host(good, CUDA) is None
    for groups, device, message in (
        (good, torch.device("cpu"), "the student is not on a CUDA device"),
        ([*good, {"lr": 0.1, "fused": True}], CUDA, "group 2 is 0.1, not a tensor on cuda:0"),
        ([{"lr": torch.tensor(0.1), "fused": True}], CUDA, "group 0 is a tensor on cpu, not on cuda:0"),
        ([{"lr": there, "foreach": True}], CUDA, "group 0 is neither fused nor capturable"),
        ([], CUDA, "no parameter group"),
    ):
        assert message in str(why_on_host(groups, device))
