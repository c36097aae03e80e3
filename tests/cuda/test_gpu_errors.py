"""What the GPU refuses: each message names the op, the place, what was found, and what to do."""

from __future__ import annotations

import pytest
import torch

import lwkd
from lwkd import ops, reference

SHAPE = (2, 4, 5, 5)


CALLS = {
    "attention_divergence": lambda one, two: ops.attention_divergence([two, one], [two, two]),
    "attention_maps": lambda one, two: ops.attention_maps([two, one]),
    "jacobian_sums": lambda one, two: ops.jacobian_sums([two, two], [two, one]),
    "jacobian_divergence": lambda one, two: ops.jacobian_divergence([two, two], [two, one]),
    "rademacher": lambda one, two: ops.rademacher([two, one], 1),
    "hutchinson_trace": lambda one, two: ops.hutchinson_trace([two, one], [0, 1], 1, 2),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_on_the_cpu_beside_one_on_the_gpu_is_refused(name, cuda):
    one, two = torch.rand(SHAPE), torch.rand(SHAPE, device="cuda")
    with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=rf"{name}.*cpu") as caught:
        CALLS[name](one, two)
    assert "cuda" in str(caught.value)


def test_rates_on_two_devices_are_refused(cuda):
    statistics = torch.tensor([[0.3], [0.1]])
    with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=r"update_rates.*(cpu|cuda)"):
        ops.update_rates(reference.initial_rates(2, 1, "cuda"), statistics)
    with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=r"update_rates.*(cpu|cuda)"):
        ops.update_rates(reference.initial_rates(2), statistics.cuda())


def test_what_the_cpu_refuses_is_refused_with_the_same_words(cuda):
    calls = (
        lambda d: ops.attention_divergence([torch.rand(2, 3, device=d)[:, :0]], [torch.rand(2, 3, device=d)]),
        lambda d: ops.attention_divergence([torch.rand(SHAPE, device=d)], [torch.rand(3, 4, 5, 5, device=d)]),
        lambda d: ops.attention_maps([torch.rand(SHAPE, device=d)], power=0.5),
        lambda d: ops.attention_maps([torch.rand(SHAPE, device=d).long()]),
        lambda d: ops.jacobian_sums([torch.rand(2, 3, device=d)], [torch.rand(3, 2, device=d)]),
        lambda d: ops.jacobian_divergence([torch.rand(3, device=d)], [torch.rand(3, device=d)], kind="angle"),
        lambda d: ops.hutchinson_trace([torch.rand(3, device=d)], [2], 1, 2),
        lambda d: ops.update_rates(reference.initial_rates(2, 1, d), torch.rand(3, 1, device=d)),
    )
    for number, call in enumerate(calls):
        said = []
        for device in ("cpu", "cuda"):
            with pytest.raises((ValueError, TypeError)) as caught:
                call(device)
            said.append((caught.type, str(caught.value).splitlines()[0]))
        assert said[0] == said[1], f"call {number}"


def test_the_backend_names_the_gpu(cuda):
    assert torch.cuda.get_device_name(cuda) in lwkd.backend() or "CUDA" in lwkd.backend()


def test_a_device_that_is_not_there(cuda):
    with pytest.raises((ValueError, RuntimeError)):
        lwkd.warmup("cpu")
    with pytest.raises((ValueError, RuntimeError, AssertionError)):
        lwkd.warmup(f"cuda:{torch.cuda.device_count()}")
