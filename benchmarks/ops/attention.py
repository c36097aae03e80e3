"""Attention divergence and maps: lwkd beside eager PyTorch, ``torch.compile`` and the time to touch the bytes once.

``read`` reads every byte once; ``copy`` reads and writes the student's, as a backward pass has to. The Jensen–Shannon
divergence is measured in all four forms; the rest in two, since their passes over the features are the same code, and
batch 16 forward only: compiling takes most of the time of a run. A compiled backward pass uses what its forward pass,
which is not timed, kept for it. Maps with tangents are in ``jacobian.py``, hundreds of layers in ``layers.py``.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.harness import SMALL, backward, beside_eager, forward
from benchmarks.shapes import CIFAR, DTYPES, EXTREMES, NARROW_B16, NARROW_B64, WIDE_B16, cases, pairs
from lwkd import ops, reference

WIDER = 4
"""Times as many channels in the teacher's features as in the student's."""

JSD = cases({"imagenet": NARROW_B64, "cifar": CIFAR})
SMALLER = cases({"imagenet_b16": NARROW_B16}, EXTREMES)
L2 = cases({"imagenet_b16": NARROW_B16, "cifar": CIFAR}, EXTREMES)
MAPS = cases({"imagenet_b16": WIDE_B16, "cifar": CIFAR}, EXTREMES)

# Four layers of ViT-S, which has six heads, beside ViT-B, which has twelve; 196 patches and the class token.
PROBABILITIES = ((2, 2, 5, 5),) * 2 if SMALL else ((16, 6, 197, 197),) * 4
HEADS = 2


def divergences(**options: str) -> dict:
    """Implementations of the divergence, as functions of student and teacher."""
    return beside_eager(
        partial(ops.attention_divergence, **options), partial(reference.attention_divergence, **options)
    )


@pytest.mark.parametrize(("shapes", "memory", "dtype"), JSD + SMALLER)
def test_forward(shapes, memory, dtype, compare):
    pair = pairs(shapes, dtype, memory, wider=WIDER)
    compare(forward(divergences(), *pair))


@pytest.mark.parametrize(("shapes", "memory", "dtype"), JSD)
def test_backward(shapes, memory, dtype, compare):
    student, teacher = pairs(shapes, dtype, memory, wider=WIDER, grad="first")
    compare(backward(divergences(), student, teacher))


@pytest.mark.parametrize(("shapes", "memory", "dtype"), L2)
def test_forward_l2(shapes, memory, dtype, compare):
    pair = pairs(shapes, dtype, memory, wider=WIDER)
    compare(forward(divergences(kind="l2"), *pair))


@pytest.mark.parametrize(("shapes", "memory", "dtype"), L2)
def test_backward_l2(shapes, memory, dtype, compare):
    student, teacher = pairs(shapes, dtype, memory, wider=WIDER, grad="first")
    compare(backward(divergences(kind="l2"), student, teacher))


def probabilities(dtype: torch.dtype, grad: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Attention as softmax gives it, of student and teacher."""
    student, teacher = ([f.softmax(-1) for f in side] for side in pairs(PROBABILITIES, dtype, wider=HEADS))
    return [feature.requires_grad_(grad) for feature in student], teacher


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_probabilities(dtype, compare):
    pair = probabilities(dtype, grad=False)
    compare(forward(divergences(source="probabilities"), *pair))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_probabilities_backward(dtype, compare):
    student, teacher = probabilities(dtype, grad=True)
    compare(backward(divergences(source="probabilities"), student, teacher))


@pytest.mark.parametrize(("shapes", "memory", "dtype"), MAPS)
def test_maps(shapes, memory, dtype, compare):
    features, _ = pairs(shapes, dtype, memory)
    compare(forward(beside_eager(ops.attention_maps, reference.attention_maps), features))


@pytest.mark.parametrize(("shapes", "memory", "dtype"), MAPS)
def test_maps_backward(shapes, memory, dtype, compare):
    features, _ = pairs(shapes, dtype, memory, grad="first")
    compare(backward(beside_eager(ops.attention_maps, reference.attention_maps), features))
