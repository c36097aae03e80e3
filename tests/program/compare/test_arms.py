from __future__ import annotations

import pytest
import torch

from lwkd.program.compare.arms import AutoRGN, control, derangement, layer_decay
from lwkd.program.compare.recipe import Arm
from lwkd.program.distill.settings import Settings

RATES = torch.tensor([[1.0, 1.0, 1.0], [0.5, 1.0, 3.0], [0.3, 1.2, 0.9]])


def repeated(rates: str, seed: int = 0) -> list[list[float]]:
    found = control(Arm("c", Settings(), rates, of="a"), RATES, seed)
    return [pytest.approx(found.before(update)) for update in range(3)]


def test_the_mean_goes_to_all_segments_and_the_tail_stays_at_1():
    assert repeated("mean") == [[1, 1, 1, 1], [1.5, 1.5, 1.5, 1], [0.8, 0.8, 0.8, 1]]


@pytest.mark.parametrize("rates", ["profile", "other-profile"])
def test_a_profile_is_the_mean_over_updates(rates):
    assert repeated(rates) == [[0.6, 3.2 / 3, 4.9 / 3, 1]] * 3


def test_shuffled_rates_are_those_of_another_segment():
    for seed in range(10):
        order = derangement(3, seed)
        assert sorted(order) == [0, 1, 2]
        assert all(place != thing for place, thing in enumerate(order))
        assert repeated("shuffled", seed) == [[*row[order].tolist(), 1] for row in RATES]
    assert {tuple(derangement(3, seed)) for seed in range(20)} == {(1, 2, 0), (2, 0, 1)}
    assert derangement(1, 0) == [0]


def test_layer_decay_falls_towards_the_input():
    assert layer_decay(3, 0.5).multipliers == [0.125, 0.25, 0.5, 1.0]


def test_relative_gradient_norms_of_an_epoch_set_the_rates_of_the_next():
    one, two, still, zero = (torch.tensor(v, requires_grad=True) for v in ([3.0, 4.0], [2.0], [1.0], [0.0]))
    rates = AutoRGN([one, two, still, zero], updates_per_epoch=2)
    gradients = [([0.0, 1.0], [4.0], [1.0]), ([5.0, 0.0], [1.0], [0.0]), ([1.0, 0.0], [1.0], [1.0])]
    found = []
    for update, (g_one, g_two, g_zero) in enumerate(gradients):
        one.grad, two.grad, zero.grad = torch.tensor(g_one), torch.tensor(g_two), torch.tensor(g_zero)
        found.append(list(rates.before(update)))
    # Relative norms of the first update: 1/5, 4/2, no gradient, any gradient of a zero weight.
    assert found[0] == pytest.approx([0.1, 1.0, 0.0, 1.0])
    assert found[1] == found[0]
    # Of the second alone, since the first has been used: 5/5, 1/2.
    assert found[2] == pytest.approx([1.0, 0.5, 0.0, 0.0])
