"""Signals that make passes of their own, and a training run that notices everything they might leave behind."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from toy import BASES, batches, loss_of, make, nets, weights

import lwkd
from lwkd.nets.passes import hooks_disabled
from lwkd.signals import Hessian, Jacobian

SIGNALS: dict[str, Jacobian | Hessian] = {
    "jvp": Jacobian(),
    "difference": Jacobian(estimator="difference"),
    "vjp": Jacobian(estimator="vjp", probes=2),
    "output": Jacobian(estimator="output"),
    "jacobian of parameters": Jacobian("parameters"),
    "ggn": Hessian(probes=2),
    "hessian": Hessian(curvature="hessian"),
    "hessian of input": Hessian("input"),
}

each = pytest.mark.parametrize("signal", SIGNALS.values(), ids=SIGNALS)


class _Failing(torch.autograd.Function):
    """The identity; its backward first calls ``ask``, which may raise."""

    @staticmethod
    def forward(x: Tensor, ask: Callable[[], None]) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.ask = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.ask()
        return grad, None


class Noisy(nn.Module):
    """Draws from every random stream, and fails in the library's own passes when armed, forwards or backwards."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.armed = inner, ""

    def forward(self, x: Tensor) -> Tensor:
        if self.armed == "forward" and hooks_disabled():
            raise RuntimeError("armed")
        scale = 1.0
        if self.training:
            scale += random.random() + float(np.random.rand())
        y = nn.functional.dropout(self.inner(x), 0.5, self.training) * scale
        if self.armed == "backward" and hooks_disabled():
            y = _Failing.apply(y, self._fail)
        return y

    def _fail(self) -> None:
        raise RuntimeError("armed")


def hooks(net: nn.Module) -> list[Any]:
    """Every hook of every module, in order."""
    return [
        (name, list(held.items()))
        for module in net.modules()
        for name, held in vars(module).items()
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and hasattr(held, "items")
    ]


def noisy_nets(seed: int = 0) -> tuple[nn.Sequential, nn.Sequential, lwkd.Pairing]:
    """The toy nets, each drawing random numbers in train mode; one layer stays in eval mode, one frozen."""
    student, teacher, _ = nets(seed)
    student.low, teacher.low = Noisy(student.low), Noisy(teacher.low)
    student.high[1].eval()
    student.high[0].bias.requires_grad_(False)
    return student, teacher, lwkd.pair(student, teacher, torch.rand(1, 1, 8, 8), layers={"low": "low", "high": "high"})


def tensors_alive() -> tuple[int, int]:
    """How many there are, and how many numbers they hold."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    return len(tensors), sum(t.numel() for t in tensors if not is_lazy(t))


def seed_all() -> None:
    """Seed all random streams that the nets draw from."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)


def traces(
    form: str,
    signal: Any,
    steps: int = 3,
    between: Callable[[int, nn.Module, nn.Module, Any], None] | None = None,
) -> tuple[Any, Any]:
    """Everything that a run leaves behind, and the object that shows the rates; ``form`` "bare" is a run without lwkd.

    ``between`` steps the optimizer where given.
    """
    student, teacher, pairing = noisy_nets()
    options = {"signal": signal, "policy": lwkd.Constant(1.0), "every": 1}
    optimizer, shown = make(form, BASES["sgd"](student.parameters()), student, teacher, pairing, **options)
    seed_all()
    kept = []
    for step, (x, y) in enumerate(batches(steps)):
        optimizer.zero_grad()
        loss_of(student, teacher, x, y).backward()
        before = [hooks(net) for net in (student, teacher)]
        if between is None:
            optimizer.step()
        else:
            between(step, student, teacher, optimizer)
        assert [hooks(net) for net in (student, teacher)] == before
        kept.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
    streams = (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))
    modules = [m for net in (student, teacher) for m in net.modules()]
    flags = [m.training for m in modules], [p.requires_grad for net in (student, teacher) for p in net.parameters()]
    untouched = [p.grad for p in teacher.parameters()] + [student.high[0].bias.grad]
    assert untouched == [None] * len(untouched)
    return (weights(student), weights(teacher), kept, streams, flags), shown
