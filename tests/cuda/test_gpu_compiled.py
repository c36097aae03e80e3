"""torch.compile on the GPU, of all ops at once."""

from __future__ import annotations

import pytest
import torch
from backends import CUDA, DEVICE
from reruns import in_a_process_of_its_own
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


def test_plans_of_a_warm_up_keep_nothing_in_the_pool(cuda):
    """Of a process of its own: no shape has a plan yet, so that all are made while torch fills the graph's pool."""
    code = """
import torch, lwkd
lwkd.warmup("cuda", [torch.float32])
def total(student, teacher):
    divergence = lwkd.ops.attention_divergence([2 * s for s in student], [t + 1 for t in teacher])
    maps = lwkd.ops.attention_maps([2 * s for s in student])
    return divergence.sum() + sum(m.square().sum() for m in maps) + lwkd.ops.jacobian_sums(student, teacher).sum()
compiled = torch.compile(total, fullgraph=True, mode="reduce-overhead")
for side in (5, 6, 7):
    s, t = ([torch.rand(2, c, side, side, device="cuda") for c in (4, 8)] for _ in range(2))
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        found = compiled(s, t)
        torch.testing.assert_close(found, total(s, t), rtol=1e-4, atol=1e-6)
pool = torch.cuda.MemPool()
s, t = ([torch.rand(2, c, 9, 9, device="cuda") for c in (4, 8)] for _ in range(2))
with torch.cuda.use_mem_pool(pool):
    before = total(s, t).item()
del pool
torch.cuda.empty_cache()
torch.full((1 << 22,), -1, dtype=torch.int64, device="cuda")
print(abs(total(s, t).item() - before) < 1e-4 * abs(before))
"""
    done = in_a_process_of_its_own(code, timeout=300)
    assert done.stdout.strip() == "True", (done.stdout, done.stderr)
