"""torch.compile on the GPU, of all ops at once."""

from __future__ import annotations

import pytest
import torch
from backends import CUDA, DEVICE
from tolerances import GRADIENT, VALUE, assert_close

from lwkd import ops


def loss(student, teacher, derivatives):
    """Ops in the middle of other work."""
    scaled = [2 * s for s in student]
    divergence = ops.attention_divergence(scaled, [t + 1 for t in teacher])
    maps = ops.attention_maps(scaled)
    sums = ops.jacobian_divergence(scaled, derivatives, kind="relative")
    probes = ops.rademacher(scaled, 3)
    trace = ops.hutchinson_trace([v * s.detach() for v, s in zip(probes, scaled, strict=True)], [0, 1], 3, 2)
    return divergence.sum() + sum(m.square().sum() for m in maps) + sums.sum() + trace.sum()


@pytest.mark.parametrize("mode", ["aot_eager", "inductor", "reduce-overhead"])
def test_compiled_into_one_graph(mode):
    if DEVICE.type != "cuda" and mode != "aot_eager":
        pytest.skip("a dry run on the CPU")
    torch._dynamo.reset()
    how = {"mode": mode} if mode == "reduce-overhead" else {"backend": mode}
    compiled = torch.compile(loss, fullgraph=True, **how)
    shapes = (2, 4, 5, 5), (2, 3, 4, 4)
    student, teacher, derivatives = (CUDA.given(CUDA.randoms(shapes, number=number)) for number in range(3))
    student = [s.requires_grad_() for s in student]
    for _ in range(4):  # reduce-overhead records at the second call, and replays from the third
        with torch.no_grad():
            for s in student:
                s.add_(0.1)
        expected = loss(student, teacher, derivatives)
        gradients = torch.autograd.grad(expected, student)
        if mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        found = compiled(student, teacher, derivatives)
        assert_close(found.detach(), expected.detach(), 10 * VALUE[torch.float32])
        for one, other in zip(torch.autograd.grad(found, student), gradients, strict=True):
            assert_close(one, other, GRADIENT[torch.float32])
