"""A whole distillation step: the wrapper measuring attention at every step, with nothing due, and the bare optimizer.

Run with ``python -m pytest benchmarks/bench_optimizer.py``. Each contender has a student of its own, made alike; they
take turns, so a step of one is compared with steps of the others made at the same time.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lwkd
from lwkd.program.models import build

NEVER = 10**9
PAIRS = {"resnet18-resnet10": ("resnet18", "resnet10"), "resnet56-resnet20": ("resnet56", "resnet20")}


def stepping(student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, every: int | None) -> Callable[[], float]:
    """Seconds of one step; ``every`` None is the bare optimizer."""
    optimizer: torch.optim.Optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    if every is not None:
        pairing = lwkd.pair(student, teacher, x[:2])
        optimizer = lwkd.LayerwiseOptimizer(optimizer, student, teacher, pairing, every=every)

    def step() -> float:
        begin = time.perf_counter()
        with torch.no_grad():
            target = teacher(x)
        loss = lwkd.losses.distillation(student(x), target, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.perf_counter() - begin

    return step


@pytest.mark.benchmark(group="step")
@pytest.mark.parametrize("names", PAIRS.values(), ids=PAIRS)
def test_step(names, contest):
    torch.manual_seed(0)
    teacher, student = (build(name, classes=10, channels=3, size=32) for name in names)
    x, y = torch.rand(128, 3, 32, 32), torch.randint(10, (128,))
    # One teacher each: the hooks of one contender must not run in the steps of another.
    contest(
        {
            name: stepping(copy.deepcopy(student), copy.deepcopy(teacher).eval(), x, y, every)
            for name, every in (("lwkd", 1), ("nothing due", NEVER), ("bare", None))
        }
    )
