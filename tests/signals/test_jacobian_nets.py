"""The Jacobian signal on nets as they come: modes, dtypes, memory formats, wrappers, ways of being called."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_jacobian import ESTIMATORS, conv, paired
from tolerances import DIFFERENCE_RELU, VALUE, assert_close, rms_error
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer

import lwkd
from lwkd.program.models.registry import build
from lwkd.signals import Jacobian, estimators, measured_net
from lwkd.signals.measured_net import measured_nets

every = pytest.mark.parametrize(
    "signal",
    [*(Jacobian(estimator=e) for e in ESTIMATORS), Jacobian("parameters")],  # type: ignore[arg-type]
    ids=lambda signal: f"{signal.wrt}-{signal.estimator}",
)


def relu_nets(seed: int = 0) -> tuple[nn.Module, nn.Module, Tensor]:
    """With BatchNorm and dropout, both in train mode."""
    torch.manual_seed(seed)
    student, teacher = conv(4, nn.ReLU, norm=True), conv(6, nn.ReLU, norm=True)
    for net in (student, teacher):
        net.low.append(nn.Dropout(0.5))
    return student, teacher, torch.rand(4, 1, 6, 6)


@pytest.mark.parametrize("mode", [True, False])
def test_modes(mode: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes of a difference drop the same units: with others it says nothing."""
    student, teacher, x = relu_nets()
    pairing = paired((student, teacher, x))
    student.train(mode)
    teacher.train(mode)
    pair = measured_nets(student, teacher, pairing, x, None, 0)
    exact, approximate = (estimate(*pair, 1, 2.0)[0] for estimate in (estimators.jvp, estimators.difference))
    for one, other in zip(approximate, exact, strict=True):
        assert_close(one, other, DIFFERENCE_RELU)
    monkeypatch.setattr(measured_net, "restart", lambda *_: None)
    for one, other in zip(estimators.difference(*pair, 1, 2.0)[0], exact, strict=True):
        assert (rms_error(one, other) > 100) == mode


def test_modes_are_measured_apart() -> None:
    student, teacher, x = relu_nets()
    given = (student, teacher, paired((student, teacher, x)), x)
    training = Jacobian().measure(*given)
    student.eval()
    assert not torch.equal(training[:, 0], Jacobian().measure(*given)[:, 0])
    assert torch.equal(training[:, 1], Jacobian().measure(*given)[:, 1])


@every
def test_channels_last(signal: Jacobian) -> None:
    student, teacher, x = relu_nets()
    pairing = paired((student, teacher, x))
    expected = signal.measure(student.eval(), teacher.eval(), pairing, x)
    last = [copy.deepcopy(net).to(memory_format=torch.channels_last) for net in (student, teacher)]
    found = signal.measure(last[0], last[1], pairing, x.to(memory_format=torch.channels_last))
    # A difference divides the rounding of two passes by its step.
    assert_close(found, expected, DIFFERENCE_RELU if signal.estimator == "difference" else VALUE[torch.float32])


@every
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_float32(signal: Jacobian, half: torch.dtype) -> None:
    student, teacher, x = relu_nets()
    pairing = paired((student, teacher, x))
    student, teacher, x = student.to(half), teacher.to(half), x.to(half)
    found = signal.measure(student, teacher, pairing, x)
    assert torch.equal(found, signal.measure(student.float(), teacher.float(), pairing, x.float()))


@every
def test_float64_beside_half_precision(signal: Jacobian) -> None:
    student, teacher, x = relu_nets()
    pairing = paired((student.eval(), teacher.eval(), x))
    expected = signal.measure(student, teacher, pairing, x)
    teacher.double()
    found = signal.measure(student, teacher, pairing, x, x.double())
    assert_close(found, expected, DIFFERENCE_RELU if signal.estimator == "difference" else VALUE[torch.float32])


@every
def test_autocast_does_not_matter(signal: Jacobian) -> None:
    student, teacher, x = relu_nets()
    given = (student, teacher, paired((student, teacher, x)), x)
    expected = signal.measure(*given)
    with torch.autocast("cpu", torch.bfloat16):
        student(x)  # fills autocast's cache of weights
        assert torch.equal(signal.measure(*given), expected)


@every
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_modes_do_not_matter(signal: Jacobian, mode: Any) -> None:
    student, teacher, x = relu_nets()
    pairing = paired((student, teacher, x))
    expected = signal.measure(student, teacher, pairing, x)
    with mode():
        given = x.clone()
        assert torch.equal(signal.measure(student, teacher, pairing, given), expected)
    assert torch.equal(signal.measure(student, teacher, pairing, given), expected)


class Centred(nn.Module):
    """Works in place on what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(0.5)


@every
def test_nets_that_work_in_place_on_their_input(signal: Jacobian) -> None:
    student, teacher, x = relu_nets()
    pairing = paired((student, teacher, x))
    twice = Jacobian(signal.wrt, signal.estimator, probes=2)
    expected = twice.measure(student, teacher, pairing, x - 0.5)
    given = x.clone()
    for net in (student, teacher):
        net.low.insert(0, Centred())
    pairing = paired((student, teacher, x))
    found = twice.measure(student, teacher, pairing, given)
    assert torch.equal(given, x)
    # The step of a difference goes by the size of the input, which is another.
    assert_close(found, expected, DIFFERENCE_RELU if signal.estimator == "difference" else VALUE[torch.float32])


class Called(nn.Module):
    """Takes its picture in a way of its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.low, self.high, self.head = net.low, net.high, net.head

    def forward(self, scale: Tensor, *, batch: dict[str, Any], flag: bool = False) -> dict[str, Tensor]:
        assert flag
        x = batch["pictures"][0] * scale
        return {"logits": self.head(self.high(self.low(x)))}


@every
def test_keyword_arguments_and_nested_dicts(signal: Jacobian) -> None:
    student, teacher, x = relu_nets()
    expected = signal.measure(student, teacher, paired((student, teacher, x)), x)
    called = Called(student), Called(teacher)
    inputs = {"scale": torch.ones(4, 1, 1, 1, dtype=torch.int32), "batch": {"pictures": [x]}, "flag": True}
    # Names as the pairing of the nets themselves has them; pair() takes no nested inputs.
    pairing = paired((student, teacher, x))
    assert torch.equal(signal.measure(*called, pairing, inputs), expected)
    assert torch.equal(signal.measure(*called, pairing, inputs, dict(inputs)), expected)


@every
@pytest.mark.parametrize("wrapper", ["compile", "module.compile", "inner compile", "DataParallel", "AveragedModel"])
def test_wrappers(signal: Jacobian, wrapper: str) -> None:
    student, teacher, x = relu_nets()
    pairing = paired((student, teacher, x))
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
    itself = student, paired((student, student, x)), x
    assert torch.equal(signal.measure(student, wrapped, *itself[1:]), signal.measure(student, *itself))


def test_after_a_compiled_pass() -> None:
    student, teacher, x = relu_nets()
    given = (student, teacher, paired((student, teacher, x)), x)
    expected = Jacobian().measure(*given)
    compiled = torch.compile(student, backend="aot_eager")
    buffers = copy.deepcopy(student.state_dict())
    compiled(x).sum().backward()
    student.load_state_dict(buffers)
    assert torch.equal(Jacobian().measure(compiled, *given[1:]), expected)


def test_tied_and_frozen_parameters() -> None:
    torch.manual_seed(0)
    student, teacher, x = conv(4, nn.Tanh), conv(4, nn.Tanh), torch.rand(2, 1, 6, 6)
    pairing = paired((student, teacher, x))
    expected = Jacobian("parameters").measure(student, teacher, pairing, x)
    student.requires_grad_(False)
    assert torch.equal(Jacobian("parameters").measure(student, teacher, pairing, x), expected)
    student.high[0] = nn.Conv2d(4, 5, 3, 2, 1, bias=False)
    student.high[0].weight = teacher.high[0].weight
    student.low.append(nn.Conv2d(4, 4, 1))
    student.low.append(student.low[2])
    tied = (student, student, lwkd.pair(student, student, x, layers={"low": "low", "high": "high"}), x)
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
    pair = measured_nets(student.double(), teacher.double(), pairing, x.double(), None, 0)
    exact, approximate = (estimate(*pair, 1, 2.0)[0] for estimate in (estimators.jvp, estimators.difference))
    for one, other in zip(approximate, exact, strict=True):
        assert_close(one, other, DIFFERENCE_RELU)
