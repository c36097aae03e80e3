"""The optimizer wrapper: whole distillation steps, ``step()`` alone, and hooks alone, beside training without it.

Each implementation has nets of its own, made alike: the hooks of one must not run in the passes of another. The static
layer-wise rates of the field are in ``layer_decay.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import lwkd
from benchmarks.harness import SMALL, timed
from benchmarks.training import distil
from lwkd.policies import Constant
from lwkd.program.models.registry import build

NEVER = 10**9
PAIRS = {"resnet18-resnet10": ("resnet18", "resnet10"), "resnet56-resnet20": ("resnet56", "resnet20")}
BATCH = 128
if SMALL:
    PAIRS, BATCH = {"resnet14-resnet8": ("resnet14", "resnet8")}, 2

BASES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "sgd": (SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}),
    "adamw": (AdamW, {"lr": 1e-3, "weight_decay": 5e-4}),
}


def stepping(student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, every: int | None) -> Callable[[], float]:
    """Seconds of one step; ``every`` None is the bare optimizer."""
    optimizer: Optimizer = SGD(student.parameters(), lr=0.01, momentum=0.9)
    if every is not None:
        pairing = lwkd.pair(student, teacher, x[:2])
        optimizer = lwkd.LayerwiseOptimizer(optimizer, student, teacher, pairing, policy=lwkd.Relative(), every=every)

    return timed(distil, student, teacher, optimizer, x, y)


@pytest.mark.parametrize("names", list(PAIRS.values())[-1:], ids=list(PAIRS)[-1:])  # `lwkd profile` does others
def test_step(names, compare):
    torch.manual_seed(0)
    teacher, student = (build(name, classes=10, channels=3, size=32) for name in names)
    x, y = torch.rand(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    compare(
        {
            name: stepping(copy.deepcopy(student), copy.deepcopy(teacher).eval(), x, y, every)
            for name, every in (("lwkd", 1), ("nothing due", NEVER), ("bare", None))
        }
    )


class Stepping:
    """Optimizers of one student with fixed gradients, every one over a copy of its parameters.

    Args:
        names: of teacher and student.
        base: a key of :data:`BASES`.
    """

    def __init__(self, names: tuple[str, str], base: str) -> None:
        torch.manual_seed(0)
        self.teacher, self.student = (build(name, classes=10, channels=3, size=32) for name in names)
        self.pairing = lwkd.pair(self.student, self.teacher, torch.rand(1, 3, 32, 32))
        self.kind, self.options = BASES[base]
        self.multipliers = torch.linspace(0.5, 1.5, len(self.pairing)).tolist()

    def net(self) -> nn.Module:
        """A copy of the student, with gradients."""
        net, generator = copy.deepcopy(self.student), torch.Generator().manual_seed(1)
        for parameter in net.parameters():
            parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator)
        return net

    def bare(self, **more: Any) -> Callable[[], float]:
        """One rate for all."""
        return timed(self.kind(self.net().parameters(), **self.options, **more).step)

    def wrapped(self, **more: Any) -> Callable[[], float]:
        """A rate a layer, by lwkd; no pass is ever measured."""
        net = self.net()
        base = self.kind(net.parameters(), **self.options, **more)
        policy = Constant(self.multipliers)
        return timed(lwkd.LayerwiseOptimizer(base, net, self.teacher, self.pairing, policy=policy, every=NEVER).step)

    def grouped(self, **more: Any) -> Callable[[], float]:
        """The same rates in groups, as one writes them by hand."""
        net, owners = self.net(), self.pairing.owners()
        groups: dict[int, list[Tensor]] = {}
        for name, parameter in net.named_parameters():
            groups.setdefault(owners.get(name, -1), []).append(parameter)
        rates = [*(self.options["lr"] * m for m in self.multipliers), self.options["lr"]]  # the last is the tail's: -1
        with_rates = [{"params": parameters, "lr": rates[layer]} for layer, parameters in groups.items()]
        return timed(self.kind(with_rates, **self.options, **more).step)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("names", PAIRS.values(), ids=PAIRS)
def test_step_alone(names, base, compare):
    """Rates that differ between layers, with nothing due."""
    of = Stepping(names, base)
    compare(
        {
            "lwkd": of.wrapped(),
            "groups by hand": of.grouped(),
            "bare": of.bare(),
            "lwkd, fused base": of.wrapped(fused=True),
            "fused groups by hand": of.grouped(fused=True),
            "fused bare": of.bare(fused=True),
        }
    )


def passing(layers: int, attached: bool) -> Callable[[], float]:
    """Seconds of a forward pass of teacher and student, nets of that many identities."""
    student, teacher = (nn.Sequential(nn.Conv2d(3, 4, 1), *(nn.Identity() for _ in range(layers))) for _ in range(2))
    x = torch.rand(2, 3, 4, 4)
    if attached:
        names = [str(layer) for layer in range(1, layers + 1)]
        pairing = lwkd.pair(student, teacher, x, layers=dict(zip(names, names, strict=True)))
        base = SGD(student.parameters(), lr=0.1)
        lwkd.LayerwiseOptimizer(base, student, teacher.eval(), pairing, every=NEVER).step()  # the first is due

    def forward() -> None:
        with torch.no_grad():
            teacher(x)
        student(x)

    return timed(forward, calls=1 if SMALL else 20)


@pytest.mark.parametrize("layers", [2] if SMALL else [4, 16, 64])
def test_hooks(layers, compare):
    """With nothing due."""
    compare({"lwkd": passing(layers, True), "no hooks": passing(layers, False)})
