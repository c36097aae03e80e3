"""Nets whose layers hooks cannot see are refused when they are paired, and when they are wrapped."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import FORMS, make, train

import lwkd


def net(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * width, 3),
    )


class Around(nn.Module):
    """An eager module around one that is not."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


X = torch.rand(2, 1, 8, 8)


def _quiet(make: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


HIDDEN: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "script": (torch.jit.script, "is TorchScript.*eager module"),
    "trace": (lambda t: torch.jit.trace(t, X), "is TorchScript.*eager module"),
    "frozen": (lambda t: torch.jit.freeze(torch.jit.script(t)), "is TorchScript.*eager module"),
    "script inside": (lambda t: Around(torch.jit.script(t)), "is TorchScript.*eager module"),
    "exported": (lambda t: torch.export.export(t, (X,)), "is ExportedProgram, expected a torch.nn.Module.*unflatten"),
    "its graph": (lambda t: torch.export.export(t, (X,)).module(), "no layer of the teacher.*unflatten"),
    "function": (lambda t: t.forward, "is method, expected a torch.nn.Module"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_teacher_whose_layers_cannot_be_seen(name: str) -> None:
    torch.manual_seed(0)
    student, teacher = net(2), net(4).eval()
    hidden, message = HIDDEN[name]
    other = _quiet(lambda: hidden(teacher))
    for layers in (None, {"1": "1"}):
        with pytest.raises(lwkd.PairingError, match=message):
            lwkd.pair(student, other, X, layers=layers)
    with pytest.raises(lwkd.PairingError, match=message.replace("teacher", "student")):
        lwkd.pair(other, teacher, X)
    pairing = lwkd.pair(student, teacher, X)
    base = torch.optim.SGD(student.parameters(), lr=0.1)
    with pytest.raises(lwkd.PairingError):
        lwkd.LayerwiseOptimizer(base, student, other, pairing)
    with pytest.raises(lwkd.PairingError):
        lwkd.Capture(student, other, pairing)
    assert not student._forward_hooks
    assert not any(m._forward_hooks for m in student)


class Block(nn.Module):
    """An eager layer with TorchScript inside."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, 2, 1)
        self.act = _quiet(lambda: torch.jit.script(nn.Sequential(nn.BatchNorm2d(after), nn.ReLU())))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


SEEN: dict[str, Callable[[nn.Module], nn.Module]] = {
    "unflattened": lambda t: torch.export.unflatten(torch.export.export(t, (torch.rand(4, 1, 8, 8),))),
    "fx": lambda t: torch.fx.symbolic_trace(t),
    "quantized": lambda t: torch.ao.quantization.quantize_dynamic(t, {nn.Linear}, torch.qint8),
    "script in its layers": lambda _: nn.Sequential(Block(1, 4), Block(4, 4), nn.Flatten(), nn.Linear(16, 3)).eval(),
}


@pytest.mark.parametrize("name", SEEN)
def test_a_teacher_whose_layers_can_be_seen_works_for_attention(name: str) -> None:
    torch.manual_seed(0)
    student, teacher = net(2), _quiet(lambda: SEEN[name](net(4).eval()))
    pairing = lwkd.pair(student, teacher, torch.rand(4, 1, 8, 8))
    assert len(pairing) == 2
    optimizer, shown = make("wrapper", torch.optim.SGD(student.parameters(), lr=0.1), student, teacher, pairing)
    train(optimizer, student, teacher, 2)
    assert all(0 < divergence < 1 for divergence in shown.divergences.values())
    assert optimizer.passes["measured"] == 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("signal", ["attention", "jacobian"])
def test_nets_that_are_split_over_devices_of_one_process(form: str, signal: str, monkeypatch) -> None:
    student, teacher = net(4), net(8).eval()
    pairing = lwkd.pair(student, teacher, X)
    base = torch.optim.SGD(student.parameters(), lr=0.1)
    parallel = nn.DataParallel(student)
    with monkeypatch.context() as two_devices:
        two_devices.setattr(parallel, "device_ids", [0, 1])
        with pytest.raises(NotImplementedError, match=r"over 2 devices.*Use DistributedDataParallel"):
            make(form, base, parallel, teacher, pairing, signal=signal)
    assert not any(m._forward_hooks or m._forward_pre_hooks for both in (student, teacher) for m in both.modules())
    make(form, base, student, teacher, pairing, signal=signal)
    parallel(X)  # on one device, or none, nothing is split
    with pytest.raises(
        NotImplementedError, match="Use DistributedDataParallel"
    ):  # as one made afterwards would call it
        student._replicate_for_data_parallel()(X)
