"""A small student and teacher, and the two forms of the wrapper, for the optimizer's tests."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import lwkd
from lwkd.signals import signal_named

FORMS = ("wrapper", "attach")
each_form = pytest.mark.parametrize("form", FORMS)

BASES: dict[str, Any] = {
    "sgd": lambda p, **kw: torch.optim.SGD(p, **{"lr": 0.05, "momentum": 0.9, "foreach": False} | kw),
    "sgd_foreach": lambda p, **kw: torch.optim.SGD(p, **{"lr": 0.05, "momentum": 0.9, "foreach": True} | kw),
    "sgd_fused": lambda p, **kw: torch.optim.SGD(p, **{"lr": 0.05, "momentum": 0.9, "fused": True} | kw),
    "adam": lambda p, **kw: torch.optim.Adam(p, **{"lr": 0.01, "foreach": False} | kw),
    "adam_foreach": lambda p, **kw: torch.optim.Adam(p, **{"lr": 0.01, "foreach": True} | kw),
    "adam_fused": lambda p, **kw: torch.optim.Adam(p, **{"lr": 0.01, "fused": True} | kw),
    "adamw": lambda p, **kw: torch.optim.AdamW(p, **{"lr": 0.01, "foreach": False} | kw),
    "adamw_foreach": lambda p, **kw: torch.optim.AdamW(p, **{"lr": 0.01, "foreach": True} | kw),
    "adamw_fused": lambda p, **kw: torch.optim.AdamW(p, **{"lr": 0.01, "fused": True} | kw),
}


def net(width: int) -> nn.Sequential:
    """Two convolutional stages, each halving the size, and a head."""
    return nn.Sequential(
        OrderedDict(
            low=nn.Sequential(nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()),
            high=nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU()),
            head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 3)),
        )
    )


class Parts(nn.Module):
    """The stages and the head of a net, for a forward pass of another kind."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.low, self.high, self.head = net.low, net.high, net.head


def nets(seed: int = 0) -> tuple[nn.Sequential, nn.Sequential, lwkd.Pairing]:
    """Student, teacher (eval mode) and their pairing, the same for the same seed."""
    torch.manual_seed(seed)
    student, teacher = net(3), net(6).eval()
    return student, teacher, lwkd.pair(student, teacher, torch.rand(1, 1, 8, 8), layers={"low": "low", "high": "high"})


def batches(count: int, seed: int = 1, rows: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    """Seeded pictures and labels."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.rand(rows, 1, 8, 8, generator=generator), torch.randint(3, (rows,), generator=generator)


def moving(signal: Any = "attention") -> lwkd.Relative:
    """A policy whose rates move from the first measurement on; the default waits for a layer that agrees."""
    return lwkd.Relative(momentum=signal_named(signal).momentum)


def make(form: str, base: Optimizer, student: nn.Module, teacher: nn.Module, pairing: lwkd.Pairing, **options: Any):
    """The optimizer to step, and the object that shows the rates; they move unless a policy is given.

    ``form`` "bare" is the base alone.
    """
    if form == "bare":
        return base, None
    if options.get("policy") is None:
        options["policy"] = moving(options.get("signal", "attention"))
    if form == "wrapper":
        optimizer = lwkd.LayerwiseOptimizer(base, student, teacher, pairing, **options)
        return optimizer, optimizer
    return base, lwkd.attach(base, student, teacher, pairing, **options)


def loss_of(student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """One teacher pass, one student pass, Hinton's loss."""
    with torch.no_grad():
        t = teacher(x)
    return lwkd.losses.distillation(student(x), t, y)


def train_on(
    optimizer: Optimizer, student: nn.Module, teacher: nn.Module, given: Iterable[tuple[Tensor, Tensor]]
) -> None:
    """The unchanged training loop."""
    for x, y in given:
        loss = loss_of(student, teacher, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train_by_closures(
    optimizer: Optimizer, student: nn.Module, teacher: nn.Module, given: Iterable[tuple[Tensor, Tensor]]
) -> None:
    """A loop whose optimizer may ask for the loss more than once."""
    for x, y in given:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(student, teacher, x, y)
            loss.backward()
            return loss

        optimizer.step(closure)


def train(optimizer: Optimizer, student: nn.Module, teacher: nn.Module, count: int = 3, seed: int = 1) -> None:
    """The unchanged training loop on so many batches."""
    train_on(optimizer, student, teacher, batches(count, seed))


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bitwise equal."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def watched(
    form: str = "wrapper", base: Callable[..., Any] = BASES["sgd"], **options: Any
) -> tuple[nn.Sequential, nn.Sequential, Any, Any]:
    """Student, teacher, the optimizer to step, and the object that shows the rates."""
    student, teacher, pairing = nets()
    optimizer, shown = make(form, base(student.parameters()), student, teacher, pairing, **options)
    return student, teacher, optimizer, shown
