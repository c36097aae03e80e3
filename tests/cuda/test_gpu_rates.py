"""update_rates on the GPU against the reference, step by step, for every divergence and policy."""

from __future__ import annotations

import math

import pytest
import torch
from device_inputs import DEVICE, generator, moved
from tolerances import VALUE, assert_close

from lwkd import ops, reference
from lwkd.reference import initial_rates

pytestmark = pytest.mark.usefixtures("poisoned")

POLICIES = ("relative", "decay", "constant")
POWER = 10 * VALUE[torch.float32]
"""The GPU forms a power by way of a float32 logarithm, whose error the exponent scales."""


def statistics_of(divergence, layers, source):
    if divergence == "attention":
        return torch.rand(layers, 1, generator=source) + 0.01
    if divergence == "hessian":
        return torch.randn(layers, 2, generator=source) * torch.randint(2, (layers, 2), generator=source)
    a, b = (torch.randn(layers, 6, generator=source) for _ in range(2))
    which = torch.arange(layers).unsqueeze(1) % 5
    a = torch.where(which == 1, torch.zeros_like(a), torch.where(which == 2, -3 * b, a))
    b = torch.where(which == 3, torch.zeros_like(b), torch.where(which == 4, 100 * b, b))
    return reference.jacobian_sums(list(a), list(b))


def assert_same_state(found, expected):
    assert torch.equal(found.counts.cpu(), expected.counts)
    for name in ("average", "baseline", "divergences", "multipliers"):
        assert_close(getattr(found, name).cpu(), getattr(expected, name), POWER, 1e-7)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 0.5, -1.0, 0.0])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("divergence", reference.STATISTICS)
def test_trajectories(divergence, policy, gamma, normalize):
    source = generator()
    options = {"divergence": divergence, "policy": policy, "gamma": gamma, "normalize": normalize, "clamp": (0.25, 4.0)}
    for layers in (1, 4, 30, 512):
        columns = reference.STATISTICS[divergence]
        found, expected = initial_rates(layers, columns, DEVICE), initial_rates(layers, columns)
        for _ in range(4):
            statistics = statistics_of(divergence, layers, source)
            found, multipliers, skipped = ops.update_rates(found, moved(statistics), **options)
            expected, _, expected_skipped = reference.update_rates(expected, statistics, **options)
            assert_same_state(found, expected)
            assert torch.equal(multipliers, found.multipliers)
            assert int(skipped) == int(expected_skipped)


@pytest.mark.parametrize("bad", [(math.nan, 0.1), (0.1, math.inf), (-math.inf, 0.1), (0.0, 0.0)])
@pytest.mark.parametrize("policy", POLICIES)
def test_an_unusable_measurement_is_skipped_and_counted(bad, policy):
    good, broken = (torch.tensor(values, device=DEVICE).unsqueeze(1) for values in ((0.3, 0.1), bad))
    before, *_ = ops.update_rates(initial_rates(2, 1, DEVICE), good, policy=policy, momentum=0.0)
    after, _, skipped = ops.update_rates(before, broken, policy=policy, momentum=0.0)
    assert int(skipped) == 1
    assert after.counts.tolist() == [1, 1]
    assert all(torch.equal(kept, was) for kept, was in zip(after[:4], before[:4], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bool])
def test_an_infinite_gradient_step_masks_everything(dtype):
    good, other = (torch.tensor(values, device=DEVICE).unsqueeze(1) for values in ((0.3, 0.1), (0.5, 0.1)))
    before, *_ = ops.update_rates(initial_rates(2, 1, DEVICE), good)
    found_inf = torch.ones((), dtype=dtype, device=DEVICE)
    after, _, skipped = ops.update_rates(before, other, found_inf=found_inf)
    assert int(skipped) == 0
    assert all(torch.equal(kept, was) for kept, was in zip(after, before, strict=True))
    after, *_ = ops.update_rates(before, other, found_inf=torch.zeros_like(found_inf))
    assert after.counts.tolist() == [2, 0]


def test_no_input_is_modified_and_no_output_aliases_one():
    state, statistics = initial_rates(3, 1, DEVICE), torch.tensor([[0.1], [0.2], [0.3]], device=DEVICE)
    copies = [tensor.clone() for tensor in state]
    new, *_ = ops.update_rates(state, statistics)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(state, copies, strict=True))
    assert not {t.data_ptr() for t in new} & {t.data_ptr() for t in [*state, statistics]}
