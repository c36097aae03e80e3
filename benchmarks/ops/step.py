"""The host's side of an optimizer step with layer-wise rates: a parameter group for each rate, or one launch for all.

62 tensors, as many as ResNet-18 has, of few elements each, so that what is timed is the host's own work. The groups are
torch's fused forms on the CPU, one call for each rate; the fused step is the CUDA one with the stand-in of
``tests/standin.py`` for a driver, which takes launches and drops them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from standin import Driver, steps_as_on_cuda
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.harness import SMALL, timed
from lwkd.optimizer.fused_step import FusedStep
from lwkd.optimizer.param_groups import GroupMemory, HostScaling, scaled_step

TENSORS, STEPS = 62, 1 if SMALL else 20
RATES = (1, 4, 8, 16)
BASES = {"sgd": (SGD, {"momentum": 0.9, "fused": True}), "adamw": (AdamW, {"fused": True})}


@pytest.fixture(scope="module", autouse=True)
def driver(tmp_path_factory):
    """Launches go nowhere."""
    standin = Driver(tmp_path_factory.mktemp("standin"))
    standin.recording(False)
    with steps_as_on_cuda():
        yield standin


def made(base: str) -> tuple[Optimizer, dict[int, int]]:
    """An optimizer with gradients, and the number of each parameter."""
    kind, options = BASES[base]
    parameters = [torch.zeros(16, requires_grad=True) for _ in range(TENSORS)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return kind(parameters, lr=0.1, **options), {id(p): number for number, p in enumerate(parameters)}


def grouped(base: str, rates: int) -> Callable[[], float]:
    optimizer, number = made(base)
    # The first rate is 1, which alone leaves the user's group as it is.
    multipliers = [1 + 0.01 * rate for rate in range(rates)]
    scale = HostScaling(lambda parameter: number[id(parameter)] * rates // TENSORS, multipliers)
    return timed(scaled_step, optimizer, optimizer.step, scale, GroupMemory(), calls=STEPS)


def fused(base: str) -> Callable[[], float]:
    optimizer, number = made(base)
    step, multipliers = FusedStep(optimizer), torch.ones(max(RATES))
    return timed(step.step, lambda parameter: number[id(parameter)] % max(RATES), multipliers, calls=STEPS)


@pytest.mark.parametrize("base", BASES)
def test_rates(base, compare):
    compare({"lwkd": fused(base)} | {f"{rates} groups": grouped(base, rates) for rates in RATES})
