"""opcheck and torch.compile on the GPU."""

from __future__ import annotations

import pytest
import torch
from device_inputs import DEVICE, all_moved, moved, randoms
from tolerances import GRADIENT, VALUE, assert_close

from lwkd import ops
from lwkd.reference import initial_rates


def features(dtype=torch.float32):
    shapes = (2, 4, 5, 5), (2, 3, 4, 4)
    student, teacher, tangents = (all_moved(randoms(shapes, dtype, number)) for number in range(3))
    return [s.requires_grad_() for s in student], teacher, [t.requires_grad_() for t in tangents]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_attention(dtype):
    student, teacher, tangents = features(dtype)
    check, op = torch.library.opcheck, torch.ops.lwkd
    check(op.attention_divergence, (student, teacher, "features", 2.0, "jsd", [0.5, 0.5], True))
    check(op.attention_maps, (student, tangents, 2.0, [5, 5, 2, 2]))
    plain = [s.detach() for s in student]
    _, factors = op.attention_divergence(plain, teacher, "features", 2.0, "jsd", [0.5, 0.5], True)
    check(op.attention_divergence_backward, (torch.ones(2, device=DEVICE), plain, factors, "features", 2.0))
    maps, _ = op.attention_maps(plain, [], 2.0, [5, 5, 4, 4])
    check(op.attention_maps_backward, (maps, [], plain, [], 2.0, [5, 5, 4, 4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_jacobian_and_hutchinson(dtype):
    a, b, _ = features(dtype)
    check, op = torch.library.opcheck, torch.ops.lwkd
    check(op.jacobian_sums, (a, b))
    check(op.jacobian_divergence, (a, b, "direction"))
    check(op.jacobian_sums_backward, (torch.ones(2, 4, device=DEVICE), [t.detach() for t in a], b))
    products = all_moved(randoms([(), (0,), (5, 4), (600,)], dtype))
    check(op.rademacher, (products, 7))
    check(op.hutchinson_trace, (products, [0, 0, 2, 1], 7, 4))


def test_opcheck_of_rates():
    rule = ("attention", "relative", 1.0, 0.9, [0.5, 1.5], False)
    statistics = torch.tensor([[0.3], [0.1]], device=DEVICE)
    for found_inf in (None, torch.zeros((), device=DEVICE)):
        torch.library.opcheck(torch.ops.lwkd.update_rates, (*initial_rates(2, 1, DEVICE), statistics, *rule, found_inf))


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
    student, teacher, _ = features()
    derivatives = all_moved(randoms([s.shape for s in student], number=5))
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


def test_rates_compiled():
    torch._dynamo.reset()
    state, statistics = initial_rates(2, 1, DEVICE), moved(torch.tensor([[0.3], [0.1]]))
    compiled = torch.compile(lambda s, x: ops.update_rates(s, x)[1], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(state, statistics), ops.update_rates(state, statistics)[1])
