"""The host's side of the CUDA ops, without a GPU: dispatch, plans, tables and arguments of one call over many layers.

Run with ``python -m pytest benchmarks/bench_launch.py``. The CUDA driver is the stand-in of ``tests/standin.py``, which
takes launches and does nothing, so that what is timed is the host's own work. Not in it: the driver's part of a launch,
and the copy of the addresses to the device, which is one asynchronous copy where a tensor has moved and none where all
lie where they lay at the last call.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from standin import Driver, on_cuda

CALLS = 20
LAYERS = (1, 16, 64, 512)


@pytest.fixture(scope="module", autouse=True)
def driver(tmp_path_factory):
    """Launches go nowhere."""
    standin = Driver(tmp_path_factory.mktemp("standin"))
    standin.recording(False)
    return standin


def timed(call: Callable[[int], object]) -> Callable[[], float]:
    """Seconds of one call, over CALLS of them, each with its number."""

    def run() -> float:
        begin = time.perf_counter()
        for number in range(CALLS):
            call(number)
        return (time.perf_counter() - begin) / CALLS

    return run


def divergence(student: list[torch.Tensor], teacher: list[torch.Tensor]) -> object:
    return on_cuda("attention_divergence", student, teacher, "features", 2.0, "jsd", (0.5, 0.5), False)


@pytest.mark.benchmark(group="launch")
@pytest.mark.parametrize("layers", LAYERS)
def test_attention(layers, contest):
    sides = [[torch.empty(2, 8, 4, 4) for _ in range(layers)] for _ in range(3)]

    def separate(number: int) -> None:
        for student, teacher in zip(sides[0], sides[1], strict=True):
            divergence([student], [teacher])

    contest(
        {
            "lwkd": timed(lambda number: divergence(sides[0], sides[1])),
            "tensors moved": timed(lambda number: divergence(sides[2 * (number % 2)], sides[1])),
            "separate calls": timed(separate),
        }
    )


@pytest.mark.benchmark(group="launch")
@pytest.mark.parametrize("layers", LAYERS)
def test_jacobian(layers, contest):
    a, b = ([torch.empty(64) for _ in range(layers)] for _ in range(2))

    def separate(number: int) -> None:
        for one, other in zip(a, b, strict=True):
            on_cuda("jacobian_sums", [one], [other])

    contest({"lwkd": timed(lambda number: on_cuda("jacobian_sums", a, b)), "separate calls": timed(separate)})


@pytest.mark.benchmark(group="launch")
@pytest.mark.parametrize("layers", LAYERS)
def test_hutchinson(layers, contest):
    products = [torch.empty(64) for _ in range(layers)]

    def separate(number: int) -> None:
        for product in products:
            on_cuda("hutchinson_trace", [product], [0], 1, 1)

    contest(
        {
            "lwkd": timed(lambda number: on_cuda("hutchinson_trace", products, list(range(layers)), 1, layers)),
            "separate calls": timed(separate),
        }
    )
