"""The Jacobian signal's ops, forward and backward: lwkd beside eager PyTorch, ``torch.compile`` and the memory.

Maps with their tangents, the four sums of a pair of derivatives, and the distance formed from them. ``read`` reads
every byte once; ``copy`` reads and writes them, as a backward pass to both lists has to. Forward passes are measured in
all four forms, the divergence and the backward passes in two: all of them go through the same loops.
"""

from __future__ import annotations

import pytest

from benchmarks.harness import backward, beside_eager, copied, forward, read, timed, timed_backward
from benchmarks.shapes import CIFAR, EXTREMES, WIDE_B16, WIDE_B64, cases, pairs
from lwkd import ops, reference

# Batch 64 is a gigabyte and a half in float32, and takes eager PyTorch seconds: once is enough.
FORWARD = cases({"imagenet": WIDE_B16, "cifar": CIFAR}) + cases({"imagenet_b64": WIDE_B64}, EXTREMES[1:])
OTHERS = cases({"imagenet": WIDE_B16, "cifar": CIFAR}, EXTREMES)


@pytest.mark.parametrize(("shapes", "memory", "dtype"), FORWARD)
def test_maps_and_tangents(shapes, memory, dtype, compare):
    pair = pairs(shapes, dtype, memory)
    compare(forward(beside_eager(ops.attention_maps, reference.attention_maps), *pair))


@pytest.mark.parametrize(("shapes", "memory", "dtype"), OTHERS)
def test_maps_and_tangents_backward(shapes, memory, dtype, compare):
    pair = pairs(shapes, dtype, memory, grad="both")
    compare(backward(beside_eager(ops.attention_maps, reference.attention_maps), *pair))


@pytest.mark.parametrize(("shapes", "memory", "dtype"), FORWARD)
def test_jacobian_sums(shapes, memory, dtype, compare):
    pair = pairs(shapes, dtype, memory)
    compare(forward(beside_eager(ops.jacobian_sums, reference.jacobian_sums), *pair))


@pytest.mark.parametrize(("shapes", "memory", "dtype"), OTHERS)
def test_jacobian_sums_backward(shapes, memory, dtype, compare):
    pair = pairs(shapes, dtype, memory, grad="both")
    compare(backward(beside_eager(ops.jacobian_sums, reference.jacobian_sums), *pair))


@pytest.mark.parametrize(("shapes", "memory", "dtype"), OTHERS)
def test_jacobian_divergence(shapes, memory, dtype, compare):
    pair = pairs(shapes, dtype, memory)
    compare(forward(beside_eager(ops.jacobian_divergence, reference.jacobian_divergence), *pair))


@pytest.mark.parametrize(("shapes", "memory", "dtype"), OTHERS)
def test_jacobian_divergence_backward(shapes, memory, dtype, compare):
    # A loss goes to the student alone, and needs both to be read.
    student, teacher = pairs(shapes, dtype, memory, grad="first")
    functions = beside_eager(ops.jacobian_divergence, reference.jacobian_divergence)
    implementations = {name: timed_backward(f, student, teacher) for name, f in functions.items()}
    compare(implementations | {"copy and read": timed(lambda: (copied(student), read(teacher)))})
