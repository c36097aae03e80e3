"""The Jacobian signal's ops, forward and backward: lwkd against eager PyTorch, ``torch.compile`` and the memory.

Maps with their tangents, the four sums of a pair of derivatives, and the distance formed from them. Run with
``python -m pytest benchmarks/bench_jacobian.py``; ``conftest.py`` says how the contenders take turns and where the
ratios are kept. ``read`` reads every byte once; ``copy`` reads and writes them, as a backward pass to both lists has
to. Forward in all four forms, the divergence and the backward passes in two: all of them go through the same loops.
"""

from __future__ import annotations

import pytest
from shapes import CIFAR, EXTREMES, WIDE_B16, WIDE_B64, cases, pairs
from timing import backward, copied, forward, read, rivals, timed, timed_backward

from lwkd import ops, reference

# Batch 64 is a gigabyte and a half in float32, and takes eager PyTorch seconds: once is enough.
FORWARD = cases({"imagenet": WIDE_B16, "cifar": CIFAR}) + cases({"imagenet_b64": WIDE_B64}, EXTREMES[1:])
OTHERS = cases({"imagenet": WIDE_B16, "cifar": CIFAR}, EXTREMES)


@pytest.mark.benchmark(group="maps and tangents")
@pytest.mark.parametrize(("shapes", "memory", "dtype"), FORWARD)
def test_maps_and_tangents(shapes, memory, dtype, contest):
    pair = pairs(shapes, dtype, memory)
    contest(forward(rivals(ops.attention_maps, reference.attention_maps), *pair))


@pytest.mark.benchmark(group="maps and tangents backward")
@pytest.mark.parametrize(("shapes", "memory", "dtype"), OTHERS)
def test_maps_and_tangents_backward(shapes, memory, dtype, contest):
    pair = pairs(shapes, dtype, memory, grad="both")
    contest(backward(rivals(ops.attention_maps, reference.attention_maps), *pair))


@pytest.mark.benchmark(group="jacobian sums")
@pytest.mark.parametrize(("shapes", "memory", "dtype"), FORWARD)
def test_jacobian_sums(shapes, memory, dtype, contest):
    pair = pairs(shapes, dtype, memory)
    contest(forward(rivals(ops.jacobian_sums, reference.jacobian_sums), *pair))


@pytest.mark.benchmark(group="jacobian sums backward")
@pytest.mark.parametrize(("shapes", "memory", "dtype"), OTHERS)
def test_jacobian_sums_backward(shapes, memory, dtype, contest):
    pair = pairs(shapes, dtype, memory, grad="both")
    contest(backward(rivals(ops.jacobian_sums, reference.jacobian_sums), *pair))


@pytest.mark.benchmark(group="jacobian divergence")
@pytest.mark.parametrize(("shapes", "memory", "dtype"), OTHERS)
def test_jacobian_divergence(shapes, memory, dtype, contest):
    pair = pairs(shapes, dtype, memory)
    contest(forward(rivals(ops.jacobian_divergence, reference.jacobian_divergence), *pair))


@pytest.mark.benchmark(group="jacobian divergence backward")
@pytest.mark.parametrize(("shapes", "memory", "dtype"), OTHERS)
def test_jacobian_divergence_backward(shapes, memory, dtype, contest):
    # A loss goes to the student alone, and needs both to be read.
    student, teacher = pairs(shapes, dtype, memory, grad="first")
    functions = rivals(ops.jacobian_divergence, reference.jacobian_divergence)
    contenders = {name: timed_backward(f, student, teacher) for name, f in functions.items()}
    contest(contenders | {"copy and read": timed(lambda: (copied(student), read(teacher)))})
