"""The rate update kernel over sequences of measurements, against the reference."""

import pytest
import torch
from tolerances import VALUE, assert_close

from lwkd import reference
from lwkd.kernels import rates as kernels

OPTIONS = {"divergence": "attention", "policy": "relative", "gamma": 1.0, "momentum": 0.9, "clamp": (0.5, 1.5)}


def measurements(layers, columns=1):
    """Good ones with bad ones in between: NaN, infinite, all zero, and one with a single zero."""
    generator = torch.Generator().manual_seed(layers)
    sequence = [torch.rand(layers, columns, generator=generator) for _ in range(7)]
    sequence[1][-1] = float("nan")
    sequence[3][0] = float("inf")
    sequence[4].zero_()
    sequence[5][0] = 0
    return sequence


def follow(sequence, layers, columns=1, found_inf=None, **options):
    """Update both states measurement by measurement and compare them; return the kernel's last."""
    options = OPTIONS | {"normalize": False} | options
    expected = reference.initial_rates(layers, columns)
    found = tuple(expected)
    for step, statistics in enumerate(sequence):
        mask = None if found_inf is None else found_inf[step]
        expected, _, _ = reference.update_rates(expected, statistics, **options, found_inf=mask)
        before = [tensor.clone() for tensor in found]
        after = kernels.update_rates(*found, statistics, **options, found_inf=mask)
        assert all(torch.equal(*pair) for pair in zip(found, before, strict=True)), "the old state was modified"
        found = after
        for name, mine, truth in zip(expected._fields, found, expected, strict=True):
            if name == "counts":
                assert torch.equal(mine, truth)
            else:
                assert_close(mine, truth, VALUE[torch.float32])
    return reference.RateState(*found)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 0.5, -1.0, 0.0])
@pytest.mark.parametrize("policy", ["relative", "decay", "constant"])
def test_sequence(policy, gamma, normalize):
    state = follow(measurements(5), 5, policy=policy, gamma=gamma, normalize=normalize)
    # The all-zero measurement counts: the average it enters is not zero.
    assert state.counts.tolist() == [5, 2]


@pytest.mark.parametrize("layers", [1, 128, 200, 512])
def test_layer_counts(layers):
    follow(measurements(layers)[:4], layers, clamp=(0.0, 100.0))


def test_a_bad_first_measurement_leaves_rate_one():
    bad, good = torch.full((3, 1), float("nan")), torch.tensor([[1.0], [2.0], [3.0]])
    state = follow([bad], 3)
    assert state.multipliers.tolist() == [1, 1, 1]
    state = follow([bad, good], 3)
    assert state.divergences.tolist() == [1, 2, 3]
    assert state.counts.tolist() == [1, 1]


def test_infinite_gradients_mask_the_update():
    masks = [torch.tensor([value]) for value in (0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0)]
    state = follow(measurements(4), 4, found_inf=masks)
    assert state.counts.tolist() == [3, 1]


def test_decay_from_zero_and_to_zero():
    first = torch.tensor([[0.0], [0.0], [1.0]])
    second = torch.tensor([[0.0], [1.0], [0.0]])
    for gamma in (1.0, -1.0):
        follow([first, second, second], 3, policy="decay", gamma=gamma, momentum=0.0, clamp=(0.1, 10.0))


def test_several_statistics():
    sequence = measurements(6, columns=3)
    sequence[2][4, 2] = float("nan")
    follow(sequence, 6, columns=3)


def test_unknown_names():
    state = reference.initial_rates(2)
    for wrong, message in (
        ({"policy": "fastest"}, "policy 'fastest'"),
        ({"divergence": "other"}, "divergence 'other'"),
    ):
        options = OPTIONS | {"normalize": False, "found_inf": None} | wrong
        with pytest.raises(ValueError, match=message):
            kernels.update_rates(*state, torch.ones(2, 1), **options)
