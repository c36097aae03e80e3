"""Jacobian kernels, sums, distances and gradients, against the reference in float64."""

import pytest
import torch
from standin import on_cuda, words
from tolerances import GRADIENT, TRUNCATING_CAST, VALUE, assert_close

from lwkd import reference

KINDS = ("direction", "norm", "relative")

GRADIENT = GRADIENT | {torch.bfloat16: TRUNCATING_CAST}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Around a vector, a step, and a chunk.
SIZES = [1, 3, 8, 9, 1023, 1025, 0, 8192, 8191, 8193, 20001]


def pairs(sizes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sides = [[torch.randn(size, generator=generator).to(dtype) for size in sizes] for _ in range(2)]
    return sides[0], sides[1]


def check(a, b):
    """Sums and gradients of both sides."""
    wide = [[t.double().requires_grad_() for t in side] for side in (a, b)]
    expected = reference.jacobian_sums(*wide)
    found = on_cuda("jacobian_sums", a, b)
    assert found.dtype == torch.float32
    assert_close(found, expected.detach(), VALUE[torch.float32])

    grad = torch.randn(len(a), 4, generator=torch.Generator().manual_seed(len(a)))
    truths = torch.autograd.grad(expected, [*wide[0], *wide[1]], grad.double())
    results = on_cuda("jacobian_sums_backward", grad, a, b)
    for result, truth, given in zip([*results[0], *results[1]], truths, [*a, *b], strict=True):
        assert result.dtype == given.dtype
        if given.numel():
            assert_close(result, truth, GRADIENT[given.dtype])
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(dtype):
    check(*pairs(SIZES, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_pointers(dtype):
    a, b = pairs([9, 1030, 8200], dtype)
    assert a[0][1:].data_ptr() % 16 != 0
    check([t[1:] for t in a], [t[1:] for t in b])
    check([t[1:] for t in a], [t[:-1] for t in b])


@pytest.mark.parametrize(("dtype_a", "dtype_b"), [(0, 1), (2, 0), (1, 2)])
def test_dtypes_may_be_mixed_within_a_pair(dtype_a, dtype_b):
    a, b = pairs([9, 1030])
    check([t.to(DTYPES[dtype_a]) for t in a], [t.to(DTYPES[dtype_b]) for t in b])


def test_dtypes_may_be_mixed_among_layers():
    a, b = pairs([30, 1100, 9, 500, 64])
    check(
        [t.to(DTYPES[index % 3]) for index, t in enumerate(a)], [t.to(DTYPES[index % 3]) for index, t in enumerate(b)]
    )


def nhwc(tensor):
    return tensor.reshape(2, 3, 4, -1).contiguous(memory_format=torch.channels_last)


def gaps(tensor):
    return tensor.repeat_interleave(2, 1)[:, ::2]


VIEWS = [
    pytest.param(torch.t, torch.t, 0, id="both_transposed"),
    pytest.param(nhwc, nhwc, 0, id="both_channels_last"),
    pytest.param(lambda t: t[None, 2:], lambda t: t[None, 2:], 0, id="part_of_a_tensor"),
    pytest.param(lambda t: t, lambda t: t.t().contiguous().t(), 1, id="one_transposed"),
    pytest.param(lambda t: t.reshape(2, 3, 4, -1), nhwc, 1, id="one_channels_last"),
    pytest.param(gaps, lambda t: t.t().contiguous().t(), 1, id="one_with_gaps"),
    pytest.param(gaps, gaps, 2, id="both_with_gaps"),
    pytest.param(lambda t: t[:1].expand(6, -1), lambda t: t[:1].expand(6, -1), 2, id="overlap"),
]


@pytest.mark.parametrize(("view_a", "view_b", "copies"), VIEWS)
def test_views(view_a, view_b, copies, driver):
    (a,), (b,) = pairs([24 * 50])
    a, b = view_a(a.view(24, 50)), view_b(b.view(24, 50))
    for (gradient,), of in zip(check([a], [b]), (a, b), strict=True):
        assert gradient.stride() == torch.empty_like(of).stride()
    driver.clear()
    on_cuda("jacobian_sums", [a], [b])
    # Where the pair is read in place, the table holds its addresses; else those of copies.
    read_a, read_b = words(driver.launches[0].parameters[0], 2)
    assert (read_a != a.data_ptr()) + (read_b != b.data_ptr()) == copies


def test_512_layers_of_few_elements():
    check(*pairs([1 + index % 5 for index in range(512)]))


def test_nothing_but_empty_tensors():
    empty = [torch.empty(0), torch.empty(0, 3)]
    divergences, sums = on_cuda("jacobian_divergence", empty, empty, "direction")
    assert sums.tolist() == [[0] * 4] * 2
    assert divergences.tolist() == [0, 0]
    gradients = on_cuda("jacobian_sums_backward", sums, empty, empty)
    assert [g.shape for g in gradients[0]] == [g.shape for g in empty]


@pytest.mark.parametrize("kind", KINDS)
def test_distances(kind):
    a, b = pairs([5, 300, 300, 300, 300, 300, 300, 1])
    b[1] = 3 * a[1]
    b[2] = -a[2]
    b[3] = 0 * b[3]
    a[4], b[4] = 0 * a[4], 0 * b[4]
    a[5] = 0 * a[5]
    b[6] = a[6] * 2 + 0.1 * b[6]
    found, sums = on_cuda("jacobian_divergence", a, b, kind)
    expected = reference.jacobian_divergence([t.double() for t in a], [t.double() for t in b], kind=kind)
    assert sums.dtype == torch.float64
    assert found.dtype == torch.float32
    assert torch.equal(sums.float(), on_cuda("jacobian_sums", a, b))
    assert_close(found, expected, VALUE[torch.float32])
    assert torch.equal(found, reference.jacobian_distance(sums, kind).float())


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
def test_small_distances(size):
    (a,), (noise,) = pairs([9000])
    b = a + size * noise
    expected = reference.jacobian_divergence([a.double()], [b.double()])
    found, _ = on_cuda("jacobian_divergence", [a], [b], "direction")
    assert expected.item() < 2 * size**2
    assert_close(found, expected, VALUE[torch.float32], floor=0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_bad_values_spoil_only_their_own_layer(bad):
    a, b = pairs([1030, 1030, 1030])
    a[1][-1] = bad
    for kind in KINDS:
        found, _ = on_cuda("jacobian_divergence", a, b, kind)
        assert torch.isnan(found).tolist() == [False, True, False]
        assert torch.equal(found[::2], on_cuda("jacobian_divergence", a[::2], b[::2], kind)[0])


def test_bitwise_repeatable():
    a, b = pairs([1030, 20001])
    runs = [
        (on_cuda("jacobian_sums", a, b), *on_cuda("jacobian_sums_backward", torch.ones(2, 4), a, b)[0])
        for _ in range(2)
    ]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_a_strided_gradient_of_the_sums_in_float64():
    a, b = pairs([40, 50])
    grad = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).t().double()
    found = on_cuda("jacobian_sums_backward", grad, a, b)
    expected = on_cuda("jacobian_sums_backward", grad.float().contiguous(), a, b)
    for side in range(2):
        assert all(torch.equal(*pair) for pair in zip(found[side], expected[side], strict=True))


def test_errors_name_the_layer():
    a, b = pairs([4, 4])
    with pytest.raises(TypeError, match=r"layer 1: teacher: found float64; the GPU kernels read float32"):
        on_cuda("jacobian_sums", a, [b[0], b[1].double()])
    with pytest.raises(ValueError, match=r"expected kind 'direction', 'norm' or 'relative', found 'angle'"):
        on_cuda("jacobian_divergence", a, b, "angle")
