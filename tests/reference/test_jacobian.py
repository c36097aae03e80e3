"""The specification of the Jacobian's sums and distances against closed forms, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import CLOSED_FORM, assert_close

from lwkd import reference

KINDS = ("direction", "norm", "relative")
LARGEST = {"direction": 4.0, "norm": 1.0, "relative": 2.0}


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def distance(a, b, kind):
    return reference.jacobian_divergence([a], [b], kind=kind).item()


def test_sums_by_hand():
    found = reference.jacobian_sums([vector(1.0, 2.0, -3.0), vector(0.5)], [vector(2.0, 0.0, 1.0), vector(-0.5)])
    assert_close(found, torch.tensor([[14.0, 5.0, -1.0, 21.0], [0.25, 0.25, -0.25, 1.0]]).double(), CLOSED_FORM)


@pytest.mark.parametrize("angle", [0.0, 0.1, math.pi / 3, math.pi / 2, 3.0, math.pi])
@pytest.mark.parametrize("scale", [1.0, 1.5, 100.0])
def test_two_directions(angle, scale):
    a, b = vector(1.0, 0.0), scale * vector(math.cos(angle), math.sin(angle))
    assert distance(a, b, "direction") == pytest.approx(2 - 2 * math.cos(angle), rel=CLOSED_FORM, abs=CLOSED_FORM)
    assert distance(a, b, "norm") == pytest.approx((scale - 1) / (scale + 1), rel=CLOSED_FORM, abs=CLOSED_FORM)
    apart = 1 + scale**2 - 2 * scale * math.cos(angle)
    assert distance(a, b, "relative") == pytest.approx(apart / (1 + scale**2), rel=CLOSED_FORM, abs=CLOSED_FORM)


@pytest.mark.parametrize("ratio", [0.5, 0.5 - 1e-9, 2.0, 2.0 + 1e-9])
def test_both_forms_of_the_direction_meet(ratio):
    a, b = vector(0.3, 0.4), ratio * vector(0.5, 0.0)
    assert distance(a, b, "direction") == pytest.approx(2 - 2 * 0.6, rel=CLOSED_FORM)


@pytest.mark.parametrize("shift", [1e-4, 1e-6])
def test_small_directions_keep_their_digits(shift):
    # a is turned by the angle whose tangent is the shift, so that 2 - 2 cos is its square, to relative shift².
    found = distance(vector(1.0, shift), vector(1.0, 0.0), "direction")
    assert found == pytest.approx(shift**2, rel=2 * shift)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros(kind):
    zero, some = vector(0.0, 0.0), vector(1.0, -2.0)
    farthest = {"direction": 4.0, "norm": 1.0, "relative": 1.0}[kind]
    assert distance(zero, zero, kind) == 0
    assert distance(zero, some, kind) == distance(some, zero, kind) == farthest
    assert distance(some, some, kind) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_sums_that_are_not_finite_are_nan(kind, bad):
    sums = torch.ones(5, 4, dtype=torch.float64)
    for place in range(4):
        sums[place, place] = bad
    found = reference.jacobian_distance(sums, kind)
    assert torch.isnan(found).tolist() == [True, True, True, True, False]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**16), length=st.integers(1, 9), scale=st.floats(1e-6, 1e6), kind=st.sampled_from(KINDS))
def test_bounds_and_symmetry(seed, length, scale, kind):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(length, generator=generator, dtype=torch.float64) for _ in range(2))
    found = distance(a, scale * b, kind)
    assert 0 <= found <= LARGEST[kind] * (1 + CLOSED_FORM)
    assert distance(scale * b, a, kind) == pytest.approx(found, rel=CLOSED_FORM, abs=CLOSED_FORM)
    if kind == "direction":
        assert distance(a, b, kind) == pytest.approx(found, rel=CLOSED_FORM, abs=CLOSED_FORM)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(3, 2, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    both = lambda x, y: reference.jacobian_divergence([x, x[:1]], [y, 5 * y[:1]], kind=kind)  # noqa: E731
    assert torch.autograd.gradcheck(both, (a, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(both, (a, b), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_where_a_derivative_is_zero(kind):
    sides = [(vector(0.0, 0.0), vector(0.0, 0.0)), (vector(0.0, 0.0), vector(1.0, 2.0)), (vector(1.0, 2.0),) * 2]
    a, b = ([side[place].clone().requires_grad_() for side in sides] for place in range(2))
    reference.jacobian_divergence(a, b, kind=kind).sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in [*a, *b])


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="'direction', 'norm' or 'relative'"):
        reference.jacobian_distance(torch.ones(1, 4), "angle")
