"""A trace must leave no mark on a model."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lwkd.pairing.tracing import PairingError, trace

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


class Busy(nn.Module):
    """Everything a forward can disturb: buffers, both random streams, the mode, a failure half-way."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout())
        self.frozen = nn.Conv2d(4, 4, 1).requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))
        self.fail = False
        self.eager_train_calls = 0

    def train(self, mode: bool = True) -> Busy:
        self.eager_train_calls += 1
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.mean().detach()
        x = self.frozen(self.body(x)) + torch.randn(1) + random.random()
        if self.fail:
            raise RuntimeError("half-way")
        return x


def snapshot(net: nn.Module, x: Tensor) -> dict[str, Any]:
    return {
        "tensors": {name: (id(t), t.clone(), t._version) for name, t in net.state_dict(keep_vars=True).items()},
        "grads": {name: (id(p.grad), None if p.grad is None else p.grad.clone()) for name, p in net.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in net.named_parameters()},
        "modes": {name: module.training for name, module in net.named_modules()},
        "hooks": {(name, h): dict(getattr(m, h)) for name, m in net.named_modules() for h in HOOKS},
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "input": (x.clone(), x.requires_grad, x.grad, x._version),
        "grad_enabled": torch.is_grad_enabled(),
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
        "train_calls": getattr(net, "eager_train_calls", 0),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_nothing_changes(fail: bool, grad: bool):
    torch.manual_seed(0)
    net, x = Busy(), torch.rand(2, 3, 6, 6) - 0.5
    net(x).sum().backward()  # gradients and statistics to lose
    net.train()
    net.body[1].eval()
    net.body[0].register_forward_hook(lambda *_: None)
    net.fail = fail
    before = snapshot(net, x)
    with torch.set_grad_enabled(grad):
        before["grad_enabled"] = grad
        if fail:
            with pytest.raises(PairingError):
                trace(net, "student", x)
        else:
            trace(net, "student", x)
        after = snapshot(net, x)
    assert [key for key in before if not same(before[key], after[key])] == []


def test_runs_under_inference_mode():
    with torch.inference_mode():
        assert trace(nn.Sequential(nn.Conv2d(3, 4, 3)), "teacher", torch.rand(1, 3, 5, 5)).outputs


def test_order_and_times():
    shared = nn.ReLU()
    net = nn.Sequential(nn.Sequential(nn.Linear(3, 3), shared), nn.Linear(3, 3), shared)
    calls = trace(net, "student", torch.rand(2, 3)).calls
    assert list(calls) == ["0.0", "0", "1", "0.1", ""]  # the shared module by its first name, at its last call
    assert calls["0.1"].begin < calls["0"].end < calls["1"].begin < calls["0.1"].end


def test_overwritten_outputs_are_known():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
            self.last, self.drop = nn.Conv2d(4, 4, 1), nn.Dropout(inplace=True)
            self.tail = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.drop(self.last(self.relu(self.norm(self.conv(x)))))
            return self.tail(x).mul_(2)

    calls = trace(Net(), "student", torch.rand(1, 3, 5, 5)).calls
    assert {name: call.overwritten_by for name, call in calls.items() if call.overwritten_by is not None} == {
        "norm": "relu",
        "last": "drop",  # idle in eval mode, but it will overwrite in training
        "tail": "",
    }
    assert [name for name, call in calls.items() if call.usable] == ["conv", "relu", "drop", ""]


def test_what_passes_its_input_through_is_no_layer():
    calls = trace(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), nn.Identity()), "student", torch.rand(1, 3, 5, 5)
    ).calls
    assert [calls[name].usable for name in "012"] == [True, False, False]


def test_a_net_may_work_in_place_on_its_input():
    x = torch.rand(2, 3, 5, 5) - 0.5
    before = x.clone()
    found = trace(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3)), "student", x)
    assert torch.equal(x, before)
    assert [node.name() for node in found.sources[0]] == ["CloneBackward0"]


def test_a_failing_forward_names_net_and_shape():
    with pytest.raises(PairingError, match=r"the teacher \(Sequential\) failed on example_input of shape \(2, 5\)"):
        trace(nn.Sequential(nn.Linear(3, 3)), "teacher", torch.rand(2, 5))


@pytest.mark.parametrize("example", [None, (), torch.tensor(1.0)])
def test_an_input_without_a_batch(example: Any):
    with pytest.raises(PairingError, match="holds no batch"):
        trace(nn.Linear(3, 3), "student", example)


def test_compiled_nets_are_traced_without_compiling():
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.compile(nn.Conv2d(4, 4, 1), backend=backend)
    )
    net.compile(backend=backend)
    assert list(trace(net, "student", torch.rand(1, 3, 5, 5)).calls) == ["0.0", "0.1", "0", "1", ""]
    assert compiled == []
    net(torch.rand(1, 3, 5, 5))
    assert compiled  # the backend does count
