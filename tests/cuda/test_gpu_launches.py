"""How many kernels a call launches: the same number however many layers, and none that copies or fills."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import DeviceType

from lwkd import ops, reference

pytestmark = pytest.mark.usefixtures("cuda")


def kernels(call):
    """Names of the kernels of the second call: the first one also writes tables, and loads what it needs."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]
    if not names:
        pytest.skip("the profiler sees no kernels on this machine")
    return [name for name in names if not name.startswith(("Memcpy", "Memset"))]


def features(layers, channels, memory):
    found = [torch.rand(4, channels, 8, 8, device="cuda") for _ in range(layers)]
    return [f.contiguous(memory_format=memory) for f in found]


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("layers", [1, 16, 64, 512])
def test_attention_divergence(layers, memory):
    student, teacher = features(layers, 8, memory), features(layers, 16, memory)
    assert len(kernels(lambda: ops.attention_divergence(student, teacher))) == 2
    tracked, grad = [s.requires_grad_() for s in student], torch.ones(layers, device="cuda")
    forward = len(kernels(lambda: ops.attention_divergence(tracked, teacher)))
    both = kernels(lambda: torch.autograd.grad(ops.attention_divergence(tracked, teacher), tracked, grad))
    assert (forward, len(both)) == (2, 3)


@pytest.mark.parametrize("layers", [1, 16, 512])
def test_other_ops(layers):
    one, two = (features(layers, 8, torch.contiguous_format) for _ in range(2))
    rates = reference.initial_rates(layers, 1, "cuda")
    statistics = torch.rand(layers, 1, device="cuda") + 0.1
    expected = {
        "maps": (2, lambda: ops.attention_maps(one)),
        "maps and tangents": (2, lambda: ops.attention_maps(one, two)),
        "sums": (2, lambda: ops.jacobian_sums(one, two)),
        "divergence": (2, lambda: ops.jacobian_divergence(one, two)),
        "signs": (1, lambda: ops.rademacher(one, 1)),
        "traces": (2, lambda: ops.hutchinson_trace(one, range(layers), 1, layers)),
        "rates": (1, lambda: ops.update_rates(rates, statistics)),
    }
    found = {name: kernels(call) for name, (_, call) in expected.items()}
    assert {name: len(of) for name, of in found.items()} == {name: count for name, (count, _) in expected.items()}, (
        found
    )


@pytest.mark.usefixtures("poisoned")
def test_fresh_memory_is_poisoned():
    """Through the dispatcher, where at::empty of C++ arrives as well."""
    assert torch.ops.aten.empty.memory_format([5], device="cuda").isnan().all()
    assert torch.empty_like(torch.ones(3, device="cuda")).isnan().all()
