"""Policies: settings, starts, and what they refuse. The rules are tested with the op, in ops/test_rates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lwkd


@pytest.mark.parametrize(
    "policy", [lwkd.Relative(0.5, 0.8, (0.1, 3), True), lwkd.Decay(2.0), lwkd.Constant([1.0, 2.0])]
)
def test_settings_are_plain_values(policy: Any) -> None:
    state = policy.state_dict()
    name = state.pop("policy")
    rebuilt = {"relative": lwkd.Relative, "decay": lwkd.Decay, "constant": lwkd.Constant}[name](**state)
    assert rebuilt == policy


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
