"""Measuring passes call the net's own forward: not what autocast or Accelerate put around or into it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from paired_nets import conv_nets, paired
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toy import each_form, make

import lwkd
from lwkd.signals import Hessian, Jacobian

BACKWARD = Jacobian(estimator="vjp"), Hessian(), Hessian(curvature="hessian")
SIGNALS = Jacobian(), *BACKWARD


def half() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def nets() -> tuple[nn.Module, nn.Module, Tensor]:
    """Student, teacher and pictures; the same at every call."""
    return conv_nets(nn.ReLU, width=4)


def attributes(net: nn.Module) -> list[dict[str, Any]]:
    return [dict(vars(module)) for module in net.modules()]


def assert_measured_as_plain(
    student: nn.Module, teacher: nn.Module, x: Tensor, plain: nn.Module | None = None, signals: Any = SIGNALS
) -> None:
    """By each signal, beside a net with the same weights that nobody touched; nothing is left behind."""
    expected = paired(nets()[0] if plain is None else plain, *nets()[1:])
    with torch.autocast("cpu", enabled=False):
        full = expected[0](x)
    output, before = student(x), attributes(student)
    assert (output - full).abs().max() > 1e-4, "this test cannot fail"
    for signal in signals:
        assert torch.equal(signal.measure(student, teacher, expected[2], x), signal.measure(*expected))
    for found, attribute in zip(attributes(student), before, strict=True):
        assert found.keys() == attribute.keys()
        assert all(found[key] is attribute[key] for key in found)
    assert torch.equal(student(x), output)


@pytest.fixture
def accelerator() -> Iterator[Any]:
    """Of one process, on the CPU, in bfloat16."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_after_accelerators_prepare(accelerator: Any) -> None:
    student, teacher, x = nets()
    student, _ = accelerator.prepare(student, torch.optim.SGD(student.parameters(), 0.1))
    teacher = accelerator.prepare_model(teacher, evaluation_mode=True)
    assert_measured_as_plain(student, teacher, x)
    assert lwkd.pair(student, teacher, x).student_layers == lwkd.pair(*nets()[:2], x).student_layers


def assert_an_update_measures_as_plain(form: str, signal: Any, student: nn.Module, accelerator: Any = None) -> None:
    """By the optimizer: the divergences are those of a net that nobody touched, with the weights of the update."""
    _, teacher, x = nets()
    pairing = paired(student if accelerator is None else nets()[0], teacher, x)[2]
    base = torch.optim.SGD(student.parameters(), 0.1)
    optimizer, shown = make(form, base, student, teacher, pairing, signal=signal, every=1)
    called, stepped = (student, optimizer) if accelerator is None else accelerator.prepare(student, optimizer)
    backward = Tensor.backward if accelerator is None else accelerator.backward
    with torch.no_grad():
        teacher(x)
    backward(called(x).square().sum())
    stepped.step()
    plain = nets()[0]
    plain.load_state_dict(dict(zip(plain.state_dict(), student.state_dict().values(), strict=True)))
    assert (called(x) - plain(x)).abs().max() > 1e-4, "this test cannot fail"
    expected = signal.divergence(signal.measure(*paired(plain, teacher, x)))
    assert list(shown.divergences.values()) == pytest.approx(expected.tolist(), rel=1e-6)


def hooked(student: nn.Module) -> Any:
    """By Accelerate: one hook casts a layer, one moves tensors."""
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(student.low, hooks.LayerwiseCastingHook(torch.bfloat16, torch.bfloat16, False))
    hooks.add_hook_to_module(student.high, hooks.AlignDevicesHook("cpu", io_same_device=True))
    return hooks


@each_form
@pytest.mark.parametrize("signal", [Jacobian(), Hessian()], ids=lambda signal: signal.name)
@pytest.mark.parametrize("hooks", [False, True], ids=["plain", "hooks"])
def test_training_with_accelerate(form: str, signal: Any, hooks: bool, accelerator: Any) -> None:
    student = nets()[0]
    if hooks:
        hooked(student)
    assert_an_update_measures_as_plain(form, signal, student, accelerator)


def test_hooks_of_accelerate(accelerator: Any) -> None:
    """Its own are left out; one that the user wrote is part of the net."""
    student, teacher, x = nets()
    hooks = hooked(student)
    accelerator.prepare_model(student)
    plain = nets()[0]
    plain.low.bfloat16().float()  # as the hook does
    assert_measured_as_plain(student, teacher, x, plain)

    class Doubled(hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 2 * output

    other, plain = nets()[0], nets()[0]
    hooks.add_hook_to_module(other.head, Doubled())
    doubled, once = (Hessian().measure(net, teacher, *paired(net, teacher, x)[2:]) for net in (other, plain))
    assert not torch.equal(doubled, once)


def test_offloaded_parameters_are_refused() -> None:
    given = paired(*nets())
    given[0].high.to("meta")
    with pytest.raises(RuntimeError, match=r"student: parameter 'high.0.weight' is on the meta device.*attention"):
        Jacobian().measure(*given)


def decorated(net: nn.Module) -> None:
    class Decorated(type(net)):  # type: ignore[misc]
        forward = half()(type(net).forward)

    net.__class__ = Decorated


def on_the_instance(net: nn.Module) -> None:
    net.forward = half()(net.forward)


class Widened(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def around_a_part(net: nn.Module) -> None:
    net.high.forward = MethodType(half()(type(net.high).forward), net.high)
    net.head.insert(0, Widened())


def inside(net: nn.Module) -> None:
    def forward(x: Tensor) -> Tensor:
        with half():
            low = net.low(x)
            with torch.autocast("cpu", enabled=False):
                low = low.float()
            return net.head(checkpoint(net.high, low, use_reentrant=False))

    net.forward = forward


@pytest.mark.parametrize("patch", [decorated, on_the_instance, around_a_part, inside])
def test_autocast_of_the_nets_own(patch: Callable[[nn.Module], None]) -> None:
    student, teacher, x = nets()
    patch(student)
    signals = BACKWARD if patch is inside else SIGNALS  # checkpointing has no forward mode
    assert_measured_as_plain(student, teacher, x, signals=signals)
    with half():
        assert_measured_as_plain(student, teacher, x, signals=signals)


@each_form
@pytest.mark.parametrize("signal", BACKWARD[:2], ids=lambda signal: signal.name)
@pytest.mark.parametrize("patch", [on_the_instance, around_a_part, inside])
def test_training_in_autocast_of_the_nets_own(form: str, signal: Any, patch: Callable[[nn.Module], None]) -> None:
    student = nets()[0]
    patch(student)
    assert_an_update_measures_as_plain(form, signal, student)


def test_a_patch_of_the_users_is_part_of_the_net() -> None:
    student, teacher, x = nets()
    own = type(student).forward
    student.forward = lambda x: 2 * own(student, x)
    doubled = copy.deepcopy(nets()[0])
    doubled.head.append(nn.Module())
    doubled.head[-1].forward = lambda x: 2 * x
    pairing = paired(*nets())[2]
    found, expected = (Hessian().measure(net, teacher, pairing, x) for net in (student, doubled))
    assert torch.equal(found, expected)


def test_autocast_elsewhere_is_left_alone() -> None:
    """Of a thread that trains meanwhile; and after a pass that fails."""
    student, teacher, x = nets()
    pairing, seen = paired(student, teacher, x)[2], []

    def train() -> None:
        with half():
            seen.append(torch.mm(x[0, 0], x[0, 0]).dtype)

    def forward(x: Tensor) -> Tensor:
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
        raise KeyError

    enter = torch.autocast.__enter__
    student.head.forward = forward
    with pytest.raises(KeyError):
        Jacobian().measure(student, teacher, pairing, x)
    train()
    assert seen == [torch.bfloat16] * len(seen)
    assert len(seen) >= 2
    assert torch.autocast.__enter__ is enter
    assert student.head.forward is forward


def test_casts_that_cannot_be_turned_off_are_said() -> None:
    student, teacher, x = nets()
    given = paired(student, teacher, x)
    student.high.forward = lambda x: nn.Sequential.forward(student.high, x).bfloat16()
    student.head.forward = lambda x: nn.Sequential.forward(student.head, x.float())
    with pytest.warns(UserWarning, match=r"layer 'high' of the student is torch.bfloat16 in a pass that is made in"):
        Jacobian(estimator="difference").measure(*given)
