"""Sign and trace kernels against the reference: signs bitwise, traces against float64."""

import math

import pytest
import torch
from standin import on_cuda
from tolerances import VALUE, assert_close

from lwkd import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Around a vector, the columns of a program, a plane, and a tile.
SIZES = [1, 7, 8, 127, 128, 129, 255, 257, 511, 512, 513, 0, 1300, 16 * 512 + 3, 65535, 65536, 65537 + 512]
SEEDS = [0, 1, -1, 12345, 2**40 + 5, 2**63 - 1, -(2**63)]


def randoms(sizes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(sizes))
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def check(products, layer_of, seed, layers):
    found = on_cuda("hutchinson_trace", products, layer_of, seed, layers)
    expected = reference.hutchinson_trace([p.double() for p in products], layer_of, seed, layers)
    assert found.dtype == torch.float32
    assert_close(found, expected, VALUE[torch.float32])
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_signs(dtype):
    like = [torch.empty(size, dtype=dtype) for size in SIZES]
    for found, expected in zip(on_cuda("rademacher", like, 7), reference.rademacher(like, 7), strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_seeds(seed):
    like = [torch.empty(3, 50), torch.empty(2, 257)]
    found = on_cuda("rademacher", like, seed)
    assert all(torch.equal(*pair) for pair in zip(found, reference.rademacher(like, seed), strict=True))
    check(randoms([150, 514]), [0, 1], seed, 2)


def test_probes_are_contiguous_whatever_they_are_like():
    like = [torch.empty(5, 6).t(), torch.empty(4, 8)[:, ::2], torch.empty(1).expand(7)]
    for found, expected in zip(on_cuda("rademacher", like, 3), reference.rademacher(like, 3), strict=True):
        assert found.is_contiguous()
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_traces(dtype):
    check(randoms(SIZES, dtype), [index % 4 for index in range(len(SIZES))], 7, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_products(dtype):
    products = [p[1:] for p in randoms([9, 130, 515, 9000], dtype)]
    assert products[0].data_ptr() % 16 != 0
    check(products, [0, 1, 0, 2], 7, 3)


def test_signs_follow_the_row_major_order_of_views():
    base = randoms([24 * 40])[0].view(24, 40)
    check([base.t(), base[:, ::2], base[3:, 1:], base[0, :1].expand(30, 2)], [0, 1, 2, 3], 11, 4)


def test_dtypes_may_be_mixed_within_a_layer():
    sizes = [600, 5, 130, 2000, 64]
    products = [p.to(DTYPES[index % 3]) for index, p in enumerate(randoms(sizes))]
    check(products, [1, 0, 1, 1, 0], 5, 2)


def test_512_layers_of_few_elements():
    products = randoms([1 + index % 5 for index in range(512)])
    check(products, list(reversed(range(512))), 9, 512)


def test_the_probe_itself_gives_the_number_of_elements():
    sizes = [100, 700, 0]
    probe = on_cuda("rademacher", randoms(sizes), 21)
    assert on_cuda("hutchinson_trace", probe, [0, 1, 1], 21, 3).tolist() == [100, 700, 0]


def test_a_layer_without_elements_has_trace_zero():
    assert on_cuda("hutchinson_trace", [torch.empty(0), torch.empty(0, 3)], [0, 2], 1, 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_products_spoil_only_their_own_layer(bad):
    products = randoms([600, 600])
    products[0][3] = bad
    found = on_cuda("hutchinson_trace", products, [0, 1], 7, 2)
    assert not math.isfinite(found[0])
    assert torch.equal(found[1:], on_cuda("hutchinson_trace", products, [0, 1], 7, 2)[1:])
    check([torch.zeros(600), products[1]], [0, 1], 7, 2)


def test_bits_depend_on_nothing_but_the_layer():
    products = randoms([3000, 40, 9000])
    together = on_cuda("hutchinson_trace", products, [0, 1, 2], 7, 3)
    assert torch.equal(together, on_cuda("hutchinson_trace", products, [0, 1, 2], 7, 3))
    moved = on_cuda("hutchinson_trace", products, [4, 0, 2], 7, 5)
    assert torch.equal(together[[0, 1, 2]], moved[[4, 0, 2]])


def test_double_precision_is_refused_by_name():
    with pytest.raises(
        TypeError, match=r"product 1: found float64; the GPU kernels read float32, float16 and bfloat16"
    ):
        on_cuda("hutchinson_trace", [torch.zeros(2), torch.zeros(2, dtype=torch.float64)], [0, 0], 1, 1)
    with pytest.raises(TypeError, match=r"rademacher: tensor 0: found float64"):
        on_cuda("rademacher", [torch.zeros(2, dtype=torch.float64)], 1)
