"""rademacher and hutchinson_trace on the GPU: the reference bit for bit, traces within the rounding of their sums."""

from __future__ import annotations

import math

import pytest
import torch
from device_inputs import DEVICE, DTYPES, all_moved, randoms
from tolerances import SIGNED_SUM

from lwkd import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = ((), (0,), (1,), (3, 0), (511,), (512,), (513,), (16383,), (16385,), (65535,), (65536,), (65537,), (200000,))
SEEDS = (0, 1, -1, 2**32, 2**63 - 1, -(2**63))
LAYERS = 5


def assert_same_signs(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape, one.device.type) == (other.dtype, other.shape, DEVICE.type)
        assert one.is_contiguous()
        assert torch.equal(one.cpu(), other)


def assert_trace(found, products, layer_of, seed, layers):
    """Within the rounding of the float32 sums, whose scale is that of the summands and not of what is left of them."""
    signs = reference.rademacher(products, seed)
    expected, magnitude = (torch.zeros(layers, dtype=torch.float64) for _ in range(2))
    for layer, product, sign in zip(layer_of, products, signs, strict=True):
        expected[layer] += (product.double() * sign.double()).sum()
        magnitude[layer] += product.double().abs().sum()
    # A program adds up to 128 planes of a column in float32, and its columns after that: four times the CPU's 32.
    assert ((found.cpu().double() - expected).abs() <= 4 * SIGNED_SUM[torch.float32] * magnitude).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_signs_of_the_reference(dtype):
    like = randoms(SHAPES, dtype)
    for seed in SEEDS:
        assert_same_signs(ops.rademacher(all_moved(like), seed), reference.rademacher(like, seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_traces_of_the_signs_of_the_reference(dtype):
    products = randoms(SHAPES, dtype)
    layer_of = [index % LAYERS for index in range(len(products))]
    for seed in SEEDS:
        found = ops.hutchinson_trace(all_moved(products), layer_of, seed, LAYERS)
        assert_trace(found, products, layer_of, seed, LAYERS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_sign_lands_on_its_own_element(dtype):
    """A product that is the probe itself counts its elements, exactly: one wrong sign would be off by two."""
    like = all_moved(randoms(SHAPES, dtype))
    for seed in SEEDS:
        found = ops.hutchinson_trace(ops.rademacher(like, seed), range(len(like)), seed, len(like))
        assert found.tolist() == [t.numel() for t in like]


@pytest.mark.parametrize("layout", ["transposed", "strided", "unaligned", "expanded"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype, layout):
    (dense,) = randoms([(70, 333)], dtype)
    product = {
        "transposed": lambda: dense.T,
        "strided": lambda: dense[:, ::3],
        "unaligned": lambda: dense.new_empty(dense.numel() + 1)[1:].copy_(dense.flatten()).view(dense.shape),
        "expanded": lambda: dense.unsqueeze(0).expand(3, *dense.shape),
    }[layout]()
    given = [product, dense, product]
    assert_same_signs(ops.rademacher(all_moved(given), 3), reference.rademacher(given, 3))
    assert_trace(ops.hutchinson_trace(all_moved(given), [0, 1, 0], 3, 2), given, [0, 1, 0], 3, 2)


def test_tensors_of_different_dtypes_and_many_tiny_ones():
    products = [t.to(DTYPES[index % 3]) for index, t in enumerate(randoms([(size % 12,) for size in range(600)]))]
    assert_same_signs(ops.rademacher(all_moved(products), 4), reference.rademacher(products, 4))
    layer_of = [index // 7 % LAYERS for index in range(len(products))]
    assert_trace(ops.hutchinson_trace(all_moved(products), layer_of, 4, LAYERS), products, layer_of, 4, LAYERS)


def test_a_layer_without_a_tensor_and_tensors_without_an_element():
    ours = all_moved(randoms([(0,), (3,)]))
    found = ops.hutchinson_trace(ours, [0, 2], 1, 4)
    assert found[[0, 1, 3]].tolist() == [0, 0, 0]
    assert ops.hutchinson_trace(ours[:1], [1], 1, 2).tolist() == [0, 0]
    assert ops.rademacher(ours[:1], 1)[0].shape == (0,)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_layer(bad, dtype):
    products = all_moved(randoms([(70000,)] * 3, dtype))
    good = ops.hutchinson_trace(products, [0, 1, 2], 2, 3)
    products[1][66000] = bad
    found = ops.hutchinson_trace(products, [0, 1, 2], 2, 3)
    assert torch.equal(found[[0, 2]], good[[0, 2]])
    assert not torch.isfinite(found[1])
