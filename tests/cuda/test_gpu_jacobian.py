"""jacobian_sums and jacobian_divergence on the GPU against the float64 reference on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from device_inputs import DTYPES, all_moved, moved, randoms
from layouts import LAYOUTS, channels_last
from tolerances import FLOOR, GRADIENT, HALF_SPACING, SMALL_DIRECTION, VALUE, assert_close

from lwkd import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned")

KINDS = ("direction", "norm", "relative")
SHAPES = (
    (7,),
    (16,),
    (129,),
    (3, 0, 4),
    (2, 8, 6, 6),
    (3, 5, 7, 5),
    (2, 3, 4, 5, 6),
    (8191,),
    (8193,),
    (4, 64, 28, 28),
)
FP32_PRODUCTS = 1e-5
"""The GPU adds in float32 within a chunk of 8,192, whose summands cancel in ``ab``."""


def assert_sums(found, expected):
    """``ab`` cancels, and is judged by the norms that it is compared with."""
    scale = torch.stack([expected[:, 0], expected[:, 1], (expected[:, 0] * expected[:, 1]).sqrt(), expected[:, 3]], 1)
    assert ((found.cpu().double() - expected).abs() <= FP32_PRODUCTS * scale + FLOOR).all()


def compare(a, b):
    """Sums, divergences and their gradients, every entry weighted differently."""
    exact_a, exact_b = ([t.detach().double().requires_grad_() for t in side] for side in (a, b))
    ours_a, ours_b = ([t.requires_grad_() for t in all_moved(side)] for side in (a, b))
    sums, expected = ops.jacobian_sums(ours_a, ours_b), reference.jacobian_sums(exact_a, exact_b)
    assert sums.dtype == torch.float32
    assert_sums(sums.detach(), expected.detach())
    weights = torch.linspace(-1, 2, expected.numel(), dtype=torch.float64).view_as(expected)
    pairs = [(sums, expected, weights)]
    for kind in KINDS:
        found = ops.jacobian_divergence(ours_a, ours_b, kind=kind)
        exact = reference.jacobian_divergence(exact_a, exact_b, kind=kind)
        assert_close(found.detach().cpu(), exact.detach(), VALUE[torch.float32], 1e-7)
        pairs.append((found, exact, weights[:, 1]))
    for found, exact, weight in pairs:
        gradients = torch.autograd.grad(found, [*ours_a, *ours_b], weight.float().to(found.device))
        expected_gradients = torch.autograd.grad((exact * weight).sum(), [*exact_a, *exact_b])
        for gradient, truth, tensor in zip(gradients, expected_gradients, [*ours_a, *ours_b], strict=True):
            assert gradient.dtype == tensor.dtype
            assert gradient.stride() == torch.empty_like(tensor).stride()
            if tensor.numel():
                floor = HALF_SPACING if tensor.dtype == torch.float16 else 1e-7
                assert_close(gradient.cpu(), truth, 2 * max(GRADIENT[tensor.dtype], GRADIENT[torch.float32]), floor)


@pytest.mark.parametrize("layout_b", LAYOUTS)
@pytest.mark.parametrize("layout_a", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_dtypes_and_layouts(dtype, layout_a, layout_b):
    a, b = randoms(SHAPES, dtype, 1), randoms(SHAPES, dtype, 2)
    compare([LAYOUTS[layout_a](t) for t in a], [LAYOUTS[layout_b](t) for t in b])


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.bfloat16), (torch.float16, torch.float32)])
@pytest.mark.parametrize("swap", [False, True])
def test_a_pair_of_two_dtypes(dtypes, swap):
    first, second = reversed(dtypes) if swap else dtypes
    a, b = randoms(((2, 8, 6, 6), (5,)), first, 1), randoms(((2, 8, 6, 6), (5,)), second, 2)
    compare([channels_last(a[0]), a[1]], b)


def test_expanded_and_overlapping_tensors():
    (a,), (b,) = randoms([(1, 4, 5)]), randoms([(3, 4, 5)], number=1)
    compare([a.expand(3, 4, 5), b], [b, a.expand(3, 4, 5)])
    windows = torch.arange(12.0).as_strided((5, 4), (2, 1))
    compare([windows], [windows.flip(0)])


@pytest.mark.parametrize("shape", [(100,), (64, 32, 14, 14)])
def test_small_directions_keep_their_digits(shape):
    (b,), (noise,) = randoms([shape]), randoms([shape], number=1)
    a = b * (1 + 1e-3 * noise)
    expected = reference.jacobian_divergence([a.double()], [b.double()])
    assert 1e-8 < expected.item() < 1e-5
    assert_close(ops.jacobian_divergence([moved(a)], [moved(b)]).cpu(), expected, 100 * SMALL_DIRECTION, floor=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_empty_layers(dtype, kind):
    zero, some, empty = torch.zeros(300, dtype=dtype), torch.ones(300, dtype=dtype), torch.zeros(0, dtype=dtype)
    a, b = (
        [t.requires_grad_() for t in all_moved(side)]
        for side in ((zero, zero, some, some, empty), (zero, some, zero, some, empty))
    )
    found = ops.jacobian_divergence(a, b, kind=kind)
    assert found.tolist() == [0, *([4.0 if kind == "direction" else 1.0] * 2), 0, 0]
    assert ops.jacobian_sums(a, b)[-1].tolist() == [0, 0, 0, 0]
    assert ops.jacobian_sums(a[-1:], b[-1:]).tolist() == [[0, 0, 0, 0]]
    found.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in [*a, *b])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 299])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_stay_in_their_layer(dtype, place, bad):
    a, b = randoms([(300,)] * 3, dtype), randoms([(300,)] * 3, dtype, 1)
    a[1][place] = bad
    a, b = [t.requires_grad_() for t in all_moved(a)], all_moved(b)
    assert torch.isfinite(ops.jacobian_sums(a, b)).all(1).tolist() == [True, False, True]
    for kind in KINDS:
        assert torch.isnan(ops.jacobian_divergence(a, b, kind=kind)).tolist() == [False, True, False]
    ops.jacobian_divergence(a, b).sum().backward()
    assert [bool(torch.isfinite(t.grad).all()) for t in a] == [True, False, True]


def test_many_layers_and_the_layers_beside():
    shapes = [(1 + layer % 200,) for layer in range(512)]
    a, b = randoms(shapes), randoms(shapes, number=1)
    ours = all_moved(a), all_moved(b)
    found = ops.jacobian_sums(*ours)
    assert_sums(found, reference.jacobian_sums([t.double() for t in a], [t.double() for t in b]))
    assert torch.equal(found[[7, 501]], ops.jacobian_sums(*([side[7], side[501]] for side in ours)))
