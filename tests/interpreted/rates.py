"""The rate update kernel over sequences of measurements, against the reference."""

import pytest
import torch
from standin import on_cuda
from tolerances import VALUE, assert_close

from lwkd import reference

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
        after = on_cuda("update_rates", *found, statistics, **options, found_inf=mask)
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


def derivatives(layers, size):
    """Four sums of pairs that differ by about ``size``, some of them zero; every layer of another magnitude."""
    generator = torch.Generator().manual_seed(layers)
    sequence = []
    for step in range(6):
        a = torch.randn(layers, 50, generator=generator) * torch.logspace(-3, 3, layers)[:, None]
        b = a * (1 + size * torch.randn(layers, 50, generator=generator))
        if step == 2:
            a[0] = 0
            b[1] = 0
            a[2], b[2] = 0, 0
            b[3] = -b[3]
        sequence.append(reference.jacobian_sums(a.unbind(), b.unbind()))
    return sequence


def curvatures(layers):
    """Mean curvatures of either sign, some of them zero."""
    generator = torch.Generator().manual_seed(layers)
    sequence = [torch.randn(layers, 2, generator=generator) for _ in range(6)]
    sequence[2][0, 0], sequence[2][1, 1], sequence[2][2] = 0, 0, 0
    return sequence


# A momentum that float32 holds exactly: small distances are differences of averages, and show every other rounding.
@pytest.mark.parametrize("momentum", [0.0, 0.875])
@pytest.mark.parametrize("policy", ["relative", "decay"])
@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("divergence", ["direction", "norm", "relative"])
def test_jacobian_distances(divergence, size, policy, momentum):
    options = {"divergence": divergence, "policy": policy, "momentum": momentum, "clamp": (0.01, 100.0)}
    state = follow(derivatives(6, size), 6, 4, **options)
    assert state.counts.tolist() == [6, 0]
    # Once more with a zero layer first, so that the zeros are an average of their own.
    state = follow(derivatives(6, size)[2:], 6, 4, **options)
    assert state.baseline[:3].tolist() == [4 if divergence == "direction" else 1] * 2 + [0]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("policy", ["relative", "decay"])
def test_curvature_distances(policy, momentum):
    options = {"divergence": "hessian", "policy": policy, "momentum": momentum, "clamp": (0.01, 100.0)}
    state = follow(curvatures(6), 6, 2, **options)
    assert state.counts.tolist() == [6, 0]
    state = follow(curvatures(6)[2:], 6, 2, **options)
    assert state.baseline[:3].tolist() == [1, 1, 0]


@pytest.mark.parametrize("divergence", ["attention", "direction", "norm", "relative", "hessian"])
def test_bad_measurements_of_every_divergence(divergence):
    columns = reference.rates.STATISTICS[divergence]
    for column in range(columns):
        good = curvatures(4)[:2] if divergence == "hessian" else [s[:, :columns] for s in derivatives(4, 0.1)[:2]]
        alike = torch.ones(4, columns)
        if divergence != "hessian":
            alike[:, -1] = 0
        sequence = [good[0], good[0].clone(), good[1], good[1].clone(), good[1].clone()]
        sequence[1][2, column] = float("nan")
        sequence[3][0, column] = float("inf")
        sequence[4][3, column] = float("-inf")
        state = follow(sequence, 4, columns, divergence=divergence)
        assert state.counts.tolist() == [2, 3]
        # Equal derivatives, or curvatures, leave nothing to divide the rates by.
        state = follow([alike, good[0], alike], 4, columns, divergence=divergence, momentum=0.0)
        assert state.counts.tolist() == [1, 2]


def test_a_direction_of_1e_minus_6_is_right():
    statistics = derivatives(8, 1e-3)[0]
    found = follow([statistics], 8, 4, divergence="direction").divergences
    aa, bb, _, dd = statistics.double().unbind(1)
    assert found.max() < 2e-6
    assert_close(found, (dd - (aa.sqrt() - bb.sqrt()) ** 2) / (aa * bb).sqrt(), VALUE[torch.float32], floor=0.0)


@pytest.mark.parametrize("layers", [6, 128, 512])
def test_layer_counts_of_four_statistics(layers):
    follow(derivatives(layers, 0.1)[:2], layers, 4, divergence="direction")


def test_unknown_names():
    state = reference.initial_rates(2)
    for wrong, message in (
        ({"policy": "fastest"}, "policy 'relative', 'decay' or 'constant', found 'fastest'"),
        (
            {"divergence": "other"},
            "divergence 'attention', 'direction', 'norm', 'relative' or 'hessian', found 'other'",
        ),
        ({"divergence": "norm"}, r"expected \(L, 4\) for divergence 'norm', found \[2, 1\]"),
    ):
        options = OPTIONS | {"normalize": False, "found_inf": None} | wrong
        with pytest.raises(ValueError, match=message):
            on_cuda("update_rates", *state, torch.ones(2, 1), **options)
