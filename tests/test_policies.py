"""Policies: settings, starts, and what they refuse. The rules are tested with the op, in ops/test_rates."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lwkd


@pytest.mark.parametrize(
    "policy",
    [
        lwkd.Relative(0.5, 0.8, (0.1, 3), True),
        lwkd.Decay(2.0),
        lwkd.Constant([1.0, 2.0]),
        lwkd.Freeze(3, 0.1, 0.2, 0.05, 5, 2),
        lwkd.Local(1.5, 0.25, (0.2, 5.0), contrast=3.0),
    ],
)
def test_settings_are_plain_values(policy: Any) -> None:
    state = policy.state_dict()
    name = state.pop("policy")
    assert type(policy).__name__.lower() == name
    assert type(policy)(**state) == policy


@pytest.mark.parametrize("rule", [lwkd.Relative, lwkd.Decay])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clamp": (1.5, 0.5)}, r"clamp is \(1.5, 0.5\); expected \(low, high\)"),
        ({"clamp": (-1.0, 0.5)}, "clamp is"),
        ({"clamp": (0.0, float("inf"))}, "both finite"),
        ({"momentum": 1.0}, r"momentum is 1.0; expected a number in \[0, 1\)"),
        ({"gamma": float("nan")}, "gamma is nan; expected a finite number"),
    ],
)
def test_settings_out_of_range(rule: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule(**options)


@pytest.mark.parametrize("multipliers", [[], -1.0, [1.0, float("nan")], float("inf")])
def test_constant_refuses_what_is_not_a_rate(multipliers: Any) -> None:
    with pytest.raises(ValueError, match="expected finite numbers that are not negative"):
        lwkd.Constant(multipliers)


def test_constant_is_in_force_from_the_start_and_stays() -> None:
    policy = lwkd.Constant([1.0, 0.5])
    state = policy.start(2, 1)
    assert state.multipliers.tolist() == [1.0, 0.5]
    state = policy.update(state, torch.tensor([[0.3], [0.1]]), "attention")
    assert state.multipliers.tolist() == [1.0, 0.5]
    torch.testing.assert_close(state.divergences, torch.tensor([0.3, 0.1]))
    with pytest.raises(ValueError, match="2 multipliers, the pairing has 3 layers"):
        policy.start(3, 1)


def test_one_pair_is_always_one_under_relative() -> None:
    policy = lwkd.Relative()
    for divergence in (0.3, 0.01):
        assert policy.update(policy.start(1, 1), torch.tensor([[divergence]]), "attention").multipliers.tolist() == [1]


def _local_by_hand(policy: lwkd.Local, e: list[float]) -> list[float]:
    """The formula with loops, in float64."""
    largest = max(e)
    strength = max(0.0, 1 - policy.contrast * e[0] / largest)
    before, found = 0.0, []
    for layer in range(len(e)):
        up_to = max(e[: layer + 1])
        rate = (up_to / largest) ** (policy.gamma * strength)
        rate *= 1 + (policy.clamp[1] - 1) * strength * (up_to - before) / largest
        found.append(min(max(rate, policy.clamp[0]), policy.clamp[1]))
        before = up_to
    return found


@pytest.mark.parametrize(
    "e",
    [
        [0.0, 0.0, 0.06, 0.04, 0.02],  # one damaged layer
        [0.002, 0.01, 0.013, 0.06, 0.05],
        [0.01, 0.02, 0.05, 0.04, 0.09],
        [0.0, 0.0, 0.0, 0.0, 0.1],
        [0.1, 0.09, 0.04, 0.03, 0.01],  # from scratch
        [0.03, 0.05, 0.09, 0.08, 0.1],
    ],
)
@pytest.mark.parametrize("policy", [lwkd.Local(momentum=0.0), lwkd.Local(2.0, 0.0, (0.2, 3.0), contrast=6.0)])
def test_local_against_loops(policy: lwkd.Local, e: list[float]) -> None:
    measured = torch.tensor(e)[:, None]
    state = policy.update(policy.start(5, 1), measured, "attention")
    expected = torch.tensor(_local_by_hand(policy, e))
    torch.testing.assert_close(state.multipliers, expected, rtol=1e-5, atol=1e-6)
    for bad in (torch.zeros(5, 1), torch.full((5, 1), float("nan"))):  # no measurement at all
        assert torch.equal(policy.update(state, bad, "attention").multipliers, state.multipliers)
    # A frozen layer has no say, and keeps its rate: the others are as if it were not there.
    counted = torch.tensor([0, 1, 3, 4])
    measured[2] = float("nan")
    some = policy.update(policy.start(5, 1), measured, "attention", counted=counted).multipliers
    expected = torch.tensor(_local_by_hand(policy, [e[i] for i in counted]))
    torch.testing.assert_close(some[counted], expected, rtol=1e-5, atol=1e-6)
    assert some[2] == 1


def test_local_leaves_students_from_scratch_at_one() -> None:
    policy = lwkd.Local()
    for e in ([0.13, 0.09, 0.03], [0.03, 0.05, 0.09], [0.2]):
        state = policy.update(policy.start(len(e), 1), torch.tensor(e)[:, None], "attention")
        assert state.multipliers.tolist() == [1] * len(e)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contrast": 0.5}, "contrast is 0.5; expected a finite number of at least 1"),
        ({"gamma": -1.0}, "gamma is -1.0; expected a finite number of at least 0"),
        ({"gamma": float("inf")}, "gamma is inf"),
        ({"clamp": (0.1, 0.9)}, "expected a largest multiplier of at least 1"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"clamp": (2.0, 1.0)}, r"clamp is \(2.0, 1.0\)"),
    ],
)
def test_local_refuses_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lwkd.Local(**options)


def _frozen_by_hand(policy: lwkd.Freeze, measured: list[list[float]], idle: set[int]) -> list[list[float]]:
    """Multipliers after every measurement, with loops, in float64."""
    layers, e, rates = len(measured[0]), measured[0], []
    frozen: dict[int, float] = {}  # layer -> divergence when it was frozen
    before: dict[int, float] = {}  # layer that trains -> divergence at the end of its last whole window
    for count, new in enumerate(measured, 1):
        share = 2 / (policy.window + 1)
        e = new if count == 1 else [(1 - share) * a + share * b for a, b in zip(e, new, strict=True)]
        near = policy.near * max(e)
        risen = [layer for layer, at in frozen.items() if e[layer] > (1 + policy.rise) * max(at, near)]
        thawed = [layer for layer in frozen if risen and layer >= min(risen)]
        frozen = {layer: at for layer, at in frozen.items() if layer not in thawed}
        ends = count % policy.window == 0
        free = [layer for layer in range(layers) if layer not in frozen and layer not in idle]
        first = free[0] if free else layers
        was = before.get(first, float("nan"))
        settled = first in before and abs(e[first] - was) <= policy.tolerance * was
        if ends and settled and not risen and count > policy.warmup and first < layers - policy.keep:
            frozen[first] = e[first]
        for layer in range(layers - policy.keep) if count > policy.warmup else ():
            if layer in idle or layer in frozen:
                continue
            if e[layer] > near:
                break
            frozen[layer] = e[layer]
        if ends:
            before = {layer: e[layer] for layer in range(layers) if layer not in frozen and layer not in thawed}
        rates.append([0.0 if layer in frozen else 1.0 for layer in range(layers)])
    return rates


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("idle", [set(), {0}, {1}])
@pytest.mark.parametrize("near", [0.0, 0.6])
def test_freeze_against_loops(window: int, idle: set[int], near: float) -> None:
    policy = lwkd.Freeze(window=window, tolerance=0.05, rise=0.3, near=near, warmup=6, keep=2)
    generator = torch.Generator().manual_seed(window)
    falls = torch.exp(-torch.arange(120)[:, None] / torch.tensor([3.0, 6, 12, 6, 3])) + 0.3
    measured = falls * (1 + 0.02 * torch.rand(falls.shape, generator=generator))
    measured[60:, 1:] *= 2  # the data shift
    measured[90:, 0] *= 3
    expected = _frozen_by_hand(policy, measured.double().tolist(), idle)
    counted = torch.tensor(sorted(set(range(5)) - idle)) if idle else None
    state, found = policy.start(5, 1), []
    for count, row in enumerate(measured):
        kept = state
        for bad in (float("nan"), float("inf")):
            state = policy.update(state, torch.full((5, 1), bad), "attention", counted=counted)
        state = policy.update(state, row[:, None], "attention", torch.ones(()), counted)
        assert all(torch.equal(a, b) for a, b in zip(state[:-1], kept[:-1], strict=True)), "skipped measurements"
        state = policy.update(state, row[:, None], "attention", counted=counted)
        found.append(state.multipliers.tolist())
        assert state.counts.tolist() == [count + 1, 2 * (count + 1)]
    assert found == expected
    sums = [sum(row) for row in found]
    other = _frozen_by_hand(replace(policy, near=0.6 - near), measured.double().tolist(), idle)
    assert found != other or 0 in idle, "near counts"
    assert min(sums) == 2 + len(idle), "all but the last two and the idle ones"
    assert any(after > before for before, after in pairwise(sums)), "something has thawed"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window is 0; expected a whole number of at least 1"),
        ({"keep": 0}, "keep is 0"),
        ({"warmup": 1.5}, "warmup is 1.5"),
        ({"tolerance": 1.0}, r"tolerance is 1.0; expected a number in \[0, 1\)"),
        ({"near": -0.1}, r"near is -0.1; expected a number in \[0, 1\)"),
        ({"rise": 0.0}, "rise is 0.0; expected a positive, finite number"),
    ],
)
def test_freeze_refuses_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lwkd.Freeze(**options)


@pytest.mark.parametrize("policy", [lwkd.Relative(), lwkd.Local(), lwkd.Decay(), lwkd.Constant(1.0), lwkd.Freeze()])
def test_no_policy_reads_a_value_on_the_host(policy: Any) -> None:
    """Fake tensors have no values: reading one raises."""
    with FakeTensorMode():
        state = policy.start(3, 1)
        state = policy.update(state, torch.rand(3, 1), "attention", torch.zeros(()))
        assert state.multipliers.shape == (3,)
