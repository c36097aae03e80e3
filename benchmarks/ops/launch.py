"""The host's side of the CUDA ops, without a GPU: dispatch, plans, tables and arguments of one call over many layers.

The CUDA driver is the stand-in of ``tests/standin.py``, which takes launches and does nothing, so that what is timed is
the host's own work. Not in it: the driver's part of a launch, and the asynchronous copy of the addresses to the device,
one where a tensor has moved since the last call and none where all lie where they lay.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.harness import SMALL, timed
from benchmarks.shapes import TINY

pytest.importorskip("triton", reason="Triton makes the images that are launched")
from standin import Driver, on_cuda

CALLS = 1 if SMALL else 20
LAYERS = (1, 16) if SMALL else (1, 16, 64, 512)


@pytest.fixture(scope="module", autouse=True)
def driver(tmp_path_factory):
    """Launches go nowhere."""
    standin = Driver(tmp_path_factory.mktemp("standin"))
    standin.recording(False)
    return standin


def divergence(student: list[torch.Tensor], teacher: list[torch.Tensor]) -> object:
    return on_cuda("attention_divergence", student, teacher, "features", 2.0, "jsd", (0.5, 0.5), False)


@pytest.mark.parametrize("layers", LAYERS)
def test_attention(layers, compare):
    here, teacher, there = ([torch.empty(TINY) for _ in range(layers)] for _ in range(3))
    moving = itertools.cycle((here, there))

    def separate() -> None:
        for student, other in zip(here, teacher, strict=True):
            divergence([student], [other])

    compare(
        {
            "lwkd": timed(divergence, here, teacher, calls=CALLS),
            "tensors moved": timed(lambda: divergence(next(moving), teacher), calls=CALLS),
            "separate calls": timed(separate, calls=CALLS),
        }
    )


@pytest.mark.parametrize("layers", LAYERS)
def test_jacobian(layers, compare):
    a, b = ([torch.empty(64) for _ in range(layers)] for _ in range(2))

    def separate() -> None:
        for one, other in zip(a, b, strict=True):
            on_cuda("jacobian_sums", [one], [other])

    whole = timed(on_cuda, "jacobian_sums", a, b, calls=CALLS)
    compare({"lwkd": whole, "separate calls": timed(separate, calls=CALLS)})


@pytest.mark.parametrize("layers", LAYERS)
def test_hutchinson(layers, compare):
    products, layer_of = [torch.empty(64) for _ in range(layers)], list(range(layers))

    def separate() -> None:
        for product in products:
            on_cuda("hutchinson_trace", [product], [0], 1, 1)

    whole = timed(on_cuda, "hutchinson_trace", products, layer_of, 1, layers, calls=CALLS)
    compare({"lwkd": whole, "separate calls": timed(separate, calls=CALLS)})
