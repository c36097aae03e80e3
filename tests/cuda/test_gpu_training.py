"""The wrapper on the GPU: what the CPU does, no waiting for the device, and rates that stay there."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn
from toy import each_form
from training import BASES, SIGNALS, Run, assert_alike, no_waiting, started

import lwkd
from lwkd.signals import Hessian, Jacobian

pytestmark = pytest.mark.usefixtures("exact_arithmetic")

STEPS = 5
CLOSE = 2e-3
"""Of rates after a few steps of two devices whose sums are rounded differently: 1e-6 a step, times what nets make of
it; a unit of a ReLU that switches moves a derivative by more."""

signalled = pytest.mark.parametrize("signal", SIGNALS)
based = pytest.mark.parametrize("base", BASES)


@pytest.mark.parametrize("base", ["sgd plain", "sgd fused", "adamw foreach"])
@signalled
def test_the_same_as_on_the_cpu(signal: str, base: str) -> None:
    ours, on_cpu = started(base, signal=signal), started(base, torch.device("cpu"), signal=signal)
    for step in range(STEPS):
        for run in (ours, on_cpu):
            run.step(*run.batch(step))
        for found, expected in zip(ours.shown(), on_cpu.shown(), strict=True):
            assert found == pytest.approx(expected, rel=CLOSE, abs=1e-5), f"step {step}"
    assert ours.optimizer.passes == on_cpu.optimizer.passes
    assert set(on_cpu.optimizer.rates.values()) != {1.0}
    assert_alike(ours.student, on_cpu.student, 10 * CLOSE)


@pytest.mark.parametrize(
    "signal",
    [Jacobian(estimator="vjp"), Jacobian(estimator="output"), Hessian(curvature="hessian")],
    ids=["vjp", "output", "hessian"],
)
def test_other_estimators_as_on_the_cpu(signal) -> None:
    ours, on_cpu = started(signal=signal), started(device=torch.device("cpu"), signal=signal)
    for step in range(3):
        for run in (ours, on_cpu):
            run.step(*run.batch(step))
    assert ours.shown()[1] == pytest.approx(on_cpu.shown()[1], rel=10 * CLOSE, abs=1e-4)


@each_form
@signalled
@based
def test_no_step_waits_for_the_device(base: str, signal: str, form: str, cuda) -> None:
    run = started(base, signal=signal, form=form)
    given = [run.batch(step) for step in range(12)]
    for x, y in given[:6]:
        run.step(x, y)
    with no_waiting():
        for x, y in given[6:]:
            run.step(x, y)
    rates, divergences = run.shown()
    assert run.handle.passes["measured"] == 12
    assert all(d > 0 for d in divergences)
    assert len(set(rates)) > 1


@each_form
@signalled
@pytest.mark.parametrize("base", ["sgd fused", "adamw fused"])
def test_no_step_with_rates_on_the_device_waits_for_it(base: str, signal: str, form: str, cuda) -> None:
    run = started(base, signal=signal, form=form, lr=torch.tensor(0.02, device=cuda))
    given = [run.batch(step) for step in range(12)]
    for x, y in given[:6]:
        run.step(x, y)
    with no_waiting():
        for x, y in given[6:]:
            run.step(x, y)
    assert len(set(run.shown()[0])) > 1


@each_form
@signalled
def test_longer_intervals_do_not_wait_either(signal: str, form: str, cuda) -> None:
    run = started("sgd foreach", signal=signal, form=form, every=5)
    given = [run.batch(step) for step in range(40)]
    for x, y in given[:16]:
        run.step(x, y)
    with no_waiting():
        for x, y in given[16:]:
            run.step(x, y)


@pytest.mark.parametrize("resident", [False, True])
@signalled
def test_the_host_is_through_with_a_step_before_the_device_begins_it(signal: str, resident: bool, cuda) -> None:
    """A step behind a long sleep on the stream: whatever waits for the stream is seen, pageable copies and all."""
    run = started("sgd fused", signal=signal, **({"lr": torch.tensor(0.02, device=cuda)} if resident else {}))
    given = [run.batch(step) for step in range(9)]
    for x, y in given[:8]:
        run.step(x, y)
    clocks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    clocks[0].record()
    torch.cuda._sleep(10_000_000)
    clocks[1].record()
    torch.cuda.synchronize()
    milliseconds = clocks[0].elapsed_time(clocks[1])
    torch.cuda._sleep(int(10_000_000 * 200 / milliseconds))
    slept = torch.cuda.Event()
    slept.record()
    start = time.perf_counter()
    run.step(*given[8])
    seconds, passed = time.perf_counter() - start, slept.query()
    assert not passed, f"the step took the host {seconds:.3f} s: it waited for the 0.2 s of sleep before it"


@pytest.mark.parametrize("base", ["sgd fused", "adamw fused"])
def test_rates_on_the_device_equal_those_of_the_host(base: str, cuda) -> None:
    lr = 0.02
    resident, on_host = started(base, lr=torch.tensor(lr, device=cuda)), started(base, lr=lr)
    for step in range(8):
        for run in (resident, on_host):
            run.step(*run.batch(step))
        assert resident.shown()[0] == pytest.approx(on_host.shown()[0], rel=1e-4), f"step {step}"
        assert resident.shown()[1] == pytest.approx(on_host.shown()[1], rel=1e-3, abs=1e-6), f"step {step}"
    assert_alike(resident.student, on_host.student, 1e-3)
    assert float(resident.optimizer.param_groups[0]["lr"]) == pytest.approx(lr)


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("base", ["sgd fused", "adamw fused", "sgd foreach"])
def test_an_infinite_gradient_changes_nothing(base: str, resident: bool, cuda) -> None:
    if resident and "fused" not in base:
        pytest.skip("rates stay on the device with fused bases only")
    run = started(base, **({"lr": torch.tensor(0.02, device=cuda)} if resident else {}))
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    for step, infinite in enumerate((False, True, False, True, False)):
        before = {name: t.clone() for name, t in run.student.named_parameters()}
        shown = run.shown()
        x, y = run.batch(step)
        run.optimizer.zero_grad()
        with torch.no_grad():
            target = run.teacher(x)
        scaler.scale(lwkd.losses.distillation(run.student(x), target, y)).backward()
        if infinite:
            next(run.student.parameters()).grad.fill_(float("inf"))
        scaler.step(run.optimizer)
        scaler.update()
        same = all(torch.equal(before[name], t) for name, t in run.student.named_parameters())
        assert same is infinite, f"step {step}"
        assert (run.shown() == shown) is infinite, f"step {step}"
    assert scaler.get_scale() == 1.0


def test_a_state_from_the_gpu_goes_on_on_the_cpu(cuda) -> None:
    ours = started("sgd fused")
    for step in range(3):
        ours.step(*ours.batch(step))
    state = ours.optimizer.state_dict()
    on_cpu = started("sgd fused", torch.device("cpu"))
    on_cpu.optimizer.load_state_dict(state)
    on_cpu.student.load_state_dict(ours.student.state_dict())
    assert on_cpu.shown() == ours.shown()
    for run in (ours, on_cpu):
        run.step(*run.batch(3))
    assert on_cpu.shown()[0] == pytest.approx(ours.shown()[0], rel=CLOSE)


def _mixed(run: Run, x: torch.Tensor, y: torch.Tensor) -> None:
    run.optimizer.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        with torch.no_grad():
            target = run.teacher(x)
        loss = lwkd.losses.distillation(run.student(x), target, y)
    loss.backward()
    run.optimizer.step()


@signalled
def test_under_autocast_and_channels_last(signal: str, cuda) -> None:
    run = started("adamw fused", signal=signal)
    run.student.to(memory_format=torch.channels_last)
    run.teacher.to(memory_format=torch.channels_last)
    for step in range(4):
        x, y = run.batch(step)
        _mixed(run, x.contiguous(memory_format=torch.channels_last), y)
    rates, divergences = run.shown()
    assert len(set(rates)) > 1
    assert all(0 < d < 10 for d in divergences)


def _across(run: Run, x: torch.Tensor) -> None:
    with torch.no_grad():
        target = run.teacher(x.cpu())
    nn.functional.mse_loss(run.student(x), target.to(x.device)).backward()
    run.optimizer.step()


def test_a_student_on_another_device_than_its_teacher_is_named(cuda) -> None:
    run = started()
    run.teacher.cpu()
    with pytest.raises((RuntimeError, ValueError), match=r"(?s)(cuda.*cpu|cpu.*cuda)"):
        _across(run, run.batch(0)[0])
