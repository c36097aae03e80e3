"""The Jacobian signal on nets as they come: modes, dtypes, memory formats, wrappers, ways of being called."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from paired_nets import Given, conv, conv_nets, every_signal, paired
from tolerances import DIFFERENCE_RELU, VALUE, assert_close, rms_error
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer
from toy import Parts

import lwkd
from lwkd.program.models.registry import build
from lwkd.signals import Jacobian, estimators, measured_net
from lwkd.signals.measured_net import measured_nets


def relu_nets() -> Given:
    """With BatchNorm and dropout, both in train mode."""
    torch.manual_seed(0)
    student, teacher = conv(4, nn.ReLU, norm=True), conv(6, nn.ReLU, norm=True)
    for net in (student, teacher):
        net.low.append(nn.Dropout(0.5))
    return paired(student, teacher, torch.rand(4, 1, 6, 6))


def near(signal: Jacobian) -> float:
    """Tolerance where two measurements differ by rounding, which a difference divides by its step."""
    return DIFFERENCE_RELU if signal.estimator == "difference" else VALUE[torch.float32]


def assert_difference_is_near_forward_mode(given: Given) -> None:
    pair = measured_nets(*given, None, 0)
    exact, approximate = (estimate(*pair, 1, 2.0)[0] for estimate in (estimators.jvp, estimators.difference))
    for one, other in zip(approximate, exact, strict=True):
        assert_close(one, other, DIFFERENCE_RELU)


@pytest.mark.parametrize("mode", [True, False])
def test_modes(mode: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes of a difference drop the same units: with others it says nothing."""
    given = relu_nets()
    for net in given[:2]:
        net.train(mode)
    assert_difference_is_near_forward_mode(given)
    pair = measured_nets(*given, None, 0)
    exact = estimators.jvp(*pair, 1, 2.0)[0]
    monkeypatch.setattr(measured_net, "seed_streams", lambda *_: None)
    for one, other in zip(estimators.difference(*pair, 1, 2.0)[0], exact, strict=True):
        assert (rms_error(one, other) > 100) == mode


def test_modes_are_measured_apart() -> None:
    given = relu_nets()
    training = Jacobian().measure(*given)
    given[0].eval()
    assert not torch.equal(training[:, 0], Jacobian().measure(*given)[:, 0])
    assert torch.equal(training[:, 1], Jacobian().measure(*given)[:, 1])


@every_signal
def test_channels_last(signal: Jacobian) -> None:
    student, teacher, pairing, x = relu_nets()
    expected = signal.measure(student.eval(), teacher.eval(), pairing, x)
    last = [copy.deepcopy(net).to(memory_format=torch.channels_last) for net in (student, teacher)]
    found = signal.measure(*last, pairing, x.to(memory_format=torch.channels_last))
    assert_close(found, expected, near(signal))


@every_signal
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_float32(signal: Jacobian, half: torch.dtype) -> None:
    student, teacher, pairing, x = relu_nets()
    found = signal.measure(student.to(half), teacher.to(half), pairing, x.to(half))
    assert torch.equal(found, signal.measure(student.float(), teacher.float(), pairing, x.to(half).float()))


@every_signal
def test_float64_beside_half_precision(signal: Jacobian) -> None:
    student, teacher, pairing, x = relu_nets()
    expected = signal.measure(student.eval(), teacher.eval(), pairing, x)
    assert_close(signal.measure(student, teacher.double(), pairing, x, x.double()), expected, near(signal))


@every_signal
def test_autocast_does_not_matter(signal: Jacobian) -> None:
    given = relu_nets()
    expected = signal.measure(*given)
    with torch.autocast("cpu", torch.bfloat16):
        given[0](given[3])  # fills autocast's cache of weights
        assert torch.equal(signal.measure(*given), expected)


@every_signal
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_modes_do_not_matter(signal: Jacobian, mode: Any) -> None:
    *nets, x = relu_nets()
    expected = signal.measure(*nets, x)
    with mode():
        own = x.clone()
        assert torch.equal(signal.measure(*nets, own), expected)
    assert torch.equal(signal.measure(*nets, own), expected)


class Centred(nn.Module):
    """Works in place on its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(0.5)


@every_signal
def test_nets_that_work_in_place_on_their_input(signal: Jacobian) -> None:
    *nets, x = relu_nets()
    twice = Jacobian(signal.wrt, signal.estimator, probes=2)
    expected = twice.measure(*nets, x - 0.5)
    for net in nets[:2]:
        net.low.insert(0, Centred())
    own = x.clone()
    found = twice.measure(*paired(*nets[:2], x)[:3], own)
    assert torch.equal(own, x)
    assert_close(found, expected, near(signal))  # the step of a difference goes by the size of the input


class Called(Parts):
    """Takes its picture in a way of its own."""

    def forward(self, scale: Tensor, *, batch: dict[str, Any], flag: bool = False) -> dict[str, Tensor]:
        assert flag
        x = batch["pictures"][0] * scale
        return {"logits": self.head(self.high(self.low(x)))}


@every_signal
def test_keyword_arguments_and_nested_dicts(signal: Jacobian) -> None:
    student, teacher, pairing, x = relu_nets()
    expected = signal.measure(student, teacher, pairing, x)
    called = Called(student), Called(teacher)
    inputs = {"scale": torch.ones(4, 1, 1, 1, dtype=torch.int32), "batch": {"pictures": [x]}, "flag": True}
    # The pairing is that of the nets themselves, with the same names: pair() takes no nested inputs.
    assert torch.equal(signal.measure(*called, pairing, inputs), expected)
    assert torch.equal(signal.measure(*called, pairing, inputs, dict(inputs)), expected)


@every_signal
@pytest.mark.parametrize("wrapper", ["compile", "module.compile", "inner compile", "DataParallel", "AveragedModel"])
def test_wrappers(signal: Jacobian, wrapper: str) -> None:
    student, teacher, pairing, x = relu_nets()
    expected = signal.measure(student, teacher, pairing, x)
    wrapped: nn.Module = copy.deepcopy(student)
    if wrapper == "compile":
        wrapped = torch.compile(wrapped, backend="eager")  # type: ignore[assignment]
    elif wrapper == "module.compile":
        wrapped.compile(backend="eager")
    elif wrapper == "inner compile":
        wrapped.low = torch.compile(wrapped.low, backend="eager")
    elif wrapper == "DataParallel":
        wrapped = nn.DataParallel(wrapped)
    else:
        wrapped = torch.optim.swa_utils.AveragedModel(wrapped)
    assert torch.equal(signal.measure(wrapped, teacher, pairing, x), expected)
    _, _, *itself = paired(student, student, x)
    assert torch.equal(signal.measure(student, wrapped, *itself), signal.measure(student, student, *itself))


def test_after_a_compiled_pass() -> None:
    student, *rest = relu_nets()
    expected = Jacobian().measure(student, *rest)
    compiled = torch.compile(student, backend="aot_eager")
    buffers = copy.deepcopy(student.state_dict())
    compiled(rest[-1]).sum().backward()
    student.load_state_dict(buffers)
    assert torch.equal(Jacobian().measure(compiled, *rest), expected)


def test_tied_and_frozen_parameters() -> None:
    student, teacher, x = conv_nets(width=4)
    given = paired(student, teacher, x)
    expected = Jacobian("parameters").measure(*given)
    student.requires_grad_(False)
    assert torch.equal(Jacobian("parameters").measure(*given), expected)
    student.high[0] = nn.Conv2d(4, 5, 3, 2, 1, bias=False)
    student.high[0].weight = teacher.high[0].weight
    student.low.append(nn.Conv2d(4, 4, 1))
    student.low.append(student.low[2])
    tied = paired(student, student, x)
    exact, approximate = Jacobian().measure(*tied), Jacobian(estimator="difference").measure(*tied)
    assert_close(approximate, exact, DIFFERENCE_RELU)
    assert torch.isfinite(Jacobian("parameters").measure(*tied)).all()


def small_vit(num_classes: int = 3) -> nn.Module:
    return VisionTransformer(16, 4, 2, 2, 16, 32, num_classes=num_classes)


def small_swin(num_classes: int = 3) -> nn.Module:
    return SwinTransformer([2, 2], 8, [1, 1], [1, 2], [4, 4], stochastic_depth_prob=0.2, num_classes=num_classes)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("name", "size"),
    [(f"{__name__}:small_vit", 16), (f"{__name__}:small_swin", 16), ("mobilenet_v3_small", 32), ("resnet8", 16)],
)
def test_difference_is_near_forward_mode_on_nets_of_the_program(name: str, size: int, train: bool) -> None:
    torch.manual_seed(0)
    student, teacher = (build(name, classes=3, channels=3, size=size).train(train) for _ in range(2))
    x = torch.rand(4, 3, size, size)
    pairing = lwkd.pair(student, teacher, x)
    Jacobian().check(student, teacher, pairing, x, None, seed=1)
    # In float32 the map of swin's patches, all of the same norm behind their LayerNorm, moves by its rounding only.
    assert_difference_is_near_forward_mode((student.double(), teacher.double(), pairing, x.double()))
