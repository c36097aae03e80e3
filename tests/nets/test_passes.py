"""Passes of the library leave nets as they were, whatever their modules do in ``forward``."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lwkd
from lwkd.nets import functional_module
from lwkd.nets.attributes import attributes_kept
from lwkd.nets.functional_module import FunctionalModule
from lwkd.nets.inputs import Inputs
from lwkd.pairing import PairingError
from lwkd.signals import Hessian, Jacobian

X = torch.linspace(-1, 1, 2 * 3 * 6 * 6).view(2, 3, 6, 6)


class WritesWeights(nn.Module):
    """Decays its weight without a graph, scales it through ``.data``, and gives it a unit norm as NormFace does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.scale = nn.Parameter(torch.ones(4, 1, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.conv.weight.mul_(0.9)
        self.conv.bias.data.add_(1)
        self.conv.weight.data = nn.functional.normalize(self.conv.weight.data, dim=0)
        return self.conv(x) * self.scale


class MaxNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4, max_norm=0.1)
        self.bag = nn.EmbeddingBag(5, 4, max_norm=0.1).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.arange(4).view(1, 4)
        return x + (self.table(ids).sum(1) + self.bag(ids).detach()).view(1, 4, 1, 1)


@dataclass
class Meter:
    total: float = 0.0
    seen: list[float] = field(default_factory=list)


class Record:
    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.length = torch.zeros(1)


class Remembers(nn.Module):
    """All kinds of attributes, reassigned, changed in place and made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.calls, self.cache = 0, None
        self.count = torch.zeros(2)
        self.alias = self.count  # one tensor under two names
        self.history, self.by_name, self.recent = [torch.zeros(1)], {"a": torch.zeros(1)}, deque([0.0], maxlen=2)
        self.pair, self.kinds = (torch.zeros(1), 1), {1}
        self.meter, self.record = Meter(), Record()
        self.numbers = np.zeros(3)
        self.generator = torch.Generator().manual_seed(1)
        self.python, self.numpy, self.legacy = random.Random(1), np.random.default_rng(1), np.random.RandomState(1)
        self.hidden = [nn.BatchNorm2d(4)]  # not registered

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        assert self.alias is self.count
        self.count += 1
        self.cache = x
        self.history[0] += 1
        self.history.append(x)
        self.by_name["a"] += 1
        self.by_name["b"] = x
        self.recent.append(1.0)
        self.pair[0].add_(1)
        self.kinds.add(self.calls)
        self.meter.total += 1
        self.meter.seen.append(1.0)
        self.record.keys.append(x)
        self.record.length += 1
        self.numbers += 1
        self.new = x.mean()
        if "late" not in self._buffers:
            self.register_buffer("late", torch.zeros(1))
            self.register_parameter("later", nn.Parameter(torch.zeros(1)))
            self.part = nn.Identity()
            self.last = nn.Parameter(torch.ones(1))
        x = self.hidden[0](self.conv(x))
        noise = torch.rand(1, generator=self.generator) + self.python.random() + float(self.numpy.random())
        noise = noise + self.legacy.rand()
        return x + 0.01 * noise + 0 * self.count.sum()


class Sequence(nn.Module):
    """An LSTM holds its weights in a list besides, and looks whether they have changed."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.lstm(x.flatten(2).transpose(1, 2))[0].transpose(1, 2).reshape(x.shape)


def observer() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.Conv2d(4, 4, 1), torch.ao.quantization.MovingAverageMinMaxObserver())


PARTS: dict[str, Callable[[], nn.Module]] = {
    "writes weights": WritesWeights,
    "max_norm": MaxNorm,
    "remembers": Remembers,
    "lstm": Sequence,
    "batch norm": lambda: nn.BatchNorm2d(4, momentum=None),
    "spectral norm by hooks": lambda: torch.nn.utils.spectral_norm(nn.Conv2d(4, 4, 1)),
    "spectral norm": lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)),
    "weight norm": lambda: torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
    "observer": observer,
}


def net_with(part: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Tanh(), PARTS[part](), nn.Conv2d(4, 6, 2, 2), nn.Flatten(), nn.Linear(24, 3)
    )


def state(value: Any, seen: set[int] | None = None) -> Any:
    """Everything that a net holds, by value and by identity."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        extra = (value._version, value.requires_grad, None if value.grad is None else state(value.grad))
        return "tensor", id(value), value.data_ptr(), pickle.dumps(value.detach().numpy()), extra
    if isinstance(value, torch.Generator):
        return pickle.dumps(value.get_state().numpy())
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return pickle.dumps(value.get_state())
    if id(value) in seen:
        return "seen"
    if isinstance(value, np.ndarray):
        return id(value), value.tobytes()
    if isinstance(value, dict):
        seen.add(id(value))
        return id(value), [(key, state(entry, seen)) for key, entry in value.items()]
    if isinstance(value, (list, tuple, deque, set)):
        seen.add(id(value))
        return id(value), [state(entry, seen) for entry in value]
    if isinstance(value, (nn.Module, Meter, Record)):
        seen.add(id(value))
        return id(value), state(vars(value), seen)
    return id(value)


PASSES: dict[str, Callable[..., Any]] = {
    "jvp": lambda s, t, p: Jacobian().measure(s, t, p, X),
    "difference": lambda s, t, p: Jacobian(estimator="difference").measure(s, t, p, X),
    "vjp": lambda s, t, p: Jacobian(estimator="vjp").measure(s, t, p, X),
    "parameters": lambda s, t, p: Jacobian(wrt="parameters").measure(s, t, p, X),
    "ggn": lambda s, t, p: Hessian().measure(s, t, p, X),
    "hessian": lambda s, t, p: Hessian(curvature="hessian").measure(s, t, p, X),
    "trace": lambda s, t, p: lwkd.hessian_trace(s, lambda net: net(X).square().sum(), probes=2),
}


@pytest.mark.parametrize("part", PARTS)
def test_pairing_and_measuring_change_nothing(part: str):
    student, teacher = net_with(part), net_with(part).eval()
    student(X).sum().backward() if part != "remembers" else None
    before = [state(student), state(teacher)]
    pairing = lwkd.pair(student, teacher, X)
    assert [state(student), state(teacher)] == before
    for name, measure in PASSES.items():
        if part == "lstm" and name == "jvp":  # no forward mode
            continue
        assert torch.is_tensor(found := measure(student, teacher, pairing)) or found.trace.isfinite().all()
        assert [state(student), state(teacher)] == before, name


def test_every_pass_begins_with_the_same_weights_and_attributes():
    net = net_with("writes weights")
    functional = FunctionalModule(net, "net")
    first = functional(Inputs.of(X))
    assert torch.equal(functional(Inputs.of(X)), first)
    assert torch.equal(copy.deepcopy(net)(X), first)


class Memoising(nn.Module):
    """Gives the answer to its first question to every other: two passes would show no difference."""

    def __init__(self, memory: bool) -> None:
        super().__init__()
        self.conv, self.memory, self.answer = nn.Conv2d(3, 4, 3), memory, None

    def forward(self, x: Tensor) -> Tensor:
        if self.answer is not None:
            return self.answer
        y = torch.tanh(self.conv(x))
        if self.memory:
            self.answer = y
        return y


def test_a_memory_does_not_reach_the_next_pass():
    found = []
    for memory in (True, False):
        torch.manual_seed(0)
        student, teacher = (nn.Sequential(Memoising(memory), nn.Conv2d(4, 2, 2, 2)).double() for _ in range(2))
        pairing = lwkd.pair(student, teacher, X.double())
        found.append(Jacobian(estimator="difference").measure(student, teacher, pairing, X.double()))
    assert torch.equal(found[0], found[1])
    assert (found[0][:, 0] > 0).all()


def test_a_forward_that_fails_leaves_nothing_either():
    net = nn.Sequential(Remembers(), nn.Linear(2, 2))
    before = state(net)
    with pytest.raises(PairingError):
        lwkd.pair(net, net, torch.rand(2, 4, 6, 6))
    assert state(net) == before


def test_a_frozen_parameter_may_be_written_to_with_a_graph():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.scale = nn.Conv2d(3, 4, 3), nn.Parameter(torch.ones(1), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) * self.scale.mul_(2)

    net = Net()
    assert lwkd.pair(net, net, X, layers={"conv": "conv"}).owners() == {"conv.weight": 0, "conv.bias": 0, "scale": 0}
    assert float(net.scale) == 1


@pytest.mark.parametrize("lazy", [nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()])
def test_parameters_that_the_first_pass_would_make_are_refused(lazy: nn.Module):
    net, ready = nn.Sequential(nn.Conv2d(3, 3, 1), lazy), nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(PairingError, match=r"the teacher \(Sequential\): '1\..*' is not initialised.*once on a batch"):
        lwkd.pair(ready, net, X)
    with pytest.raises(ValueError, match="not initialised"):
        lwkd.hessian_trace(net, lambda net: net(X).sum())
    assert any(map(nn.parameter.is_lazy, net.parameters()))


def test_long_lists_are_kept_without_a_look_inside():
    net = nn.Identity()
    net.long = [torch.zeros(1)] * 2000
    with attributes_kept(net):
        net.long[0] += 1
        net.long.append(1)
    assert len(net.long) == 2000
    assert float(net.long[0]) == 1  # as documented


def test_a_hidden_teacher_is_not_copied():
    student, teacher = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    student.teacher = [teacher]
    with attributes_kept(student):
        assert student.teacher[0] is teacher
        weight = teacher.weight
    assert teacher.weight is weight


def test_copies_of_tensors_of_many_kinds():
    """Many are copied at once, those of a kind; what is no block of ordinary numbers, by itself."""
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).half()
    net[1].float()
    given = {
        "counts": torch.tensor([1, 2, 3], dtype=torch.uint32),
        "flags": torch.tensor([True, False]),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "expanded": torch.arange(2.0).expand(3, 2),
    }
    for name, buffer in given.items():
        net.register_buffer(name, buffer)
    functional = FunctionalModule(net, "the net")
    for _ in range(2):  # the second call fills the copies of the first again
        state = functional.state()
        state["0.weight"].data.zero_()
    found = functional.state()
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        pairs = zip(found[name].unbind(), tensor.unbind(), strict=True) if tensor.dim() else [(found[name], tensor)]
        assert all(one.tolist() == other.tolist() for one, other in pairs), name
    assert found["0.weight"].dtype == torch.float32


def test_memory_of_another_device_is_not_used_again():
    net = nn.Linear(2, 2)
    first = FunctionalModule(net, "the net")
    assert first.parameters["weight"].device.type == "cpu"
    del first
    spare = functional_module._spare[net]
    functional_module._spare[net] = {name: copy.to("meta") for name, copy in spare.items()}
    again = FunctionalModule(net, "the net").parameters
    assert torch.equal(again["weight"], net.weight)
