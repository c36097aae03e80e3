"""jacobian_sums and jacobian_divergence against the float64 reference: values, gradients and how they run."""

import math
from itertools import product

import pytest
import torch
from backends import CPU, CUDA, DTYPES, assert_compiled_is_the_same, assert_gradient, each_dtype, in_float64, on, over
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, channels_last, random_in, stored
from tolerances import FLOOR, GRADIENT, HALF_SPACING, SMALL_DIRECTION, VALUE, assert_close

from lwkd import ops, reference
from lwkd.ops.jacobian import _slopes as slopes_on_gpu

KINDS = ("direction", "norm", "relative")
SHAPES = ((), (1,), (7,), (16,), (129,), (3, 0, 4), (2, 8, 6, 6), (3, 5, 7, 5), (2, 3, 4, 5, 6))
# Around a vector, a step, and a chunk of the kernels.
SIZES = ((1,), (3,), (8,), (9,), (1023,), (1025,), (0,), (8192,), (8191,), (8193,), (20001,))
LARGE = (*SHAPES[2:], (8191,), (8193,), (4, 64, 28, 28))
FP32_PRODUCTS = 1e-5
"""On a GPU, over the random inputs of a run: sums are float32 within a chunk of 8,192, whose summands cancel in ab."""


def assert_sums(backend, found, expected, tolerance=VALUE[torch.float32]):
    if backend is not CUDA:
        assert_close(found, expected, tolerance)
        return
    # ab cancels, and is judged by the norms that it is compared with.
    aa, bb, _, dd = expected.unbind(1)
    scale = torch.stack([aa, bb, (aa * bb).sqrt(), dd], 1)
    assert ((found.cpu().double() - expected).abs() <= FP32_PRODUCTS * scale + FLOOR).all()


def compare(backend, a, b, kinds=("sums", *KINDS)):
    """Sums, divergences and their gradients against the reference in float64, every entry weighted differently."""
    exact, ours = ([of(side, grad=True) for side in (a, b)] for of in (in_float64, backend.given))
    dtypes = {t.dtype for t in [*a, *b]}
    value = max(VALUE[dtype] for dtype in dtypes)
    least = 0.0 if dtypes == {torch.float64} else GRADIENT[torch.float32]
    floor = 1e-7 if backend is CUDA else FLOOR
    # One element has only two directions: what its gradient should be is zero, and what is computed is rounding.
    several = [layer for layer, t in enumerate(a) if t.numel() != 1]
    for kind in kinds if several else kinds[:1]:
        layers = range(len(a)) if kind == "sums" else several
        mine, truth = ([[side[layer] for layer in layers] for side in sides] for sides in (ours, exact))
        if kind == "sums":
            found, expected = ops.jacobian_sums(*mine), reference.jacobian_sums(*truth)
            assert_sums(backend, found.detach(), expected.detach(), value)
        else:
            found, expected = (of.jacobian_divergence(*s, kind=kind) for of, s in ((ops, mine), (reference, truth)))
            assert_close(found.detach().cpu(), expected.detach(), value, floor)
        assert found.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
        weights = torch.linspace(-1 if kind == "sums" else 1, 2, expected.numel()).view_as(expected)
        tensors, truths = [*mine[0], *mine[1]], [*truth[0], *truth[1]]
        gradients = torch.autograd.grad(found, tensors, weights.to(found))
        truths = torch.autograd.grad(expected, truths, weights.double())
        for gradient, expected_gradient, tensor in zip(gradients, truths, tensors, strict=True):
            tolerance = max(backend.gradient[tensor.dtype], least) * (2 if backend is CUDA else 1)
            smallest = HALF_SPACING if tensor.dtype == torch.float16 else floor
            if tensor.numel():
                assert_gradient(gradient, expected_gradient, tensor, tolerance, smallest)
            else:
                assert (gradient.dtype, gradient.shape) == (tensor.dtype, tensor.shape)


@over(
    "dtype, shapes, layout_a, layout_b",
    cpu=product(CPU.dtypes, [SHAPES], LAYOUTS, LAYOUTS),
    interpreted=[
        *product(DTYPES, [SIZES], ["contiguous"], ["contiguous"]),
        *product(DTYPES, [((8,), (1029,), (8199,))], ["unaligned"], ["contiguous", "unaligned"]),
    ],
    cuda=product(DTYPES, [LARGE], LAYOUTS, LAYOUTS),
)
def test_shapes_dtypes_and_layouts(backend, dtype, shapes, layout_a, layout_b):
    a, b = backend.randoms(shapes, dtype, 1), backend.randoms(shapes, dtype, 2)
    a, b = [LAYOUTS[layout_a](t) for t in a], [LAYOUTS[layout_b](t) for t in b]
    assert layout_a != "unaligned" or a[-1].data_ptr() % 16
    compare(backend, a, b)


def nhwc(tensor):
    return tensor.reshape(2, 3, 4, -1).contiguous(memory_format=torch.channels_last)


def gaps(tensor):
    return tensor.repeat_interleave(2, 1)[:, ::2]


VIEWS = {
    "both_transposed": (torch.t, torch.t),
    "both_channels_last": (nhwc, nhwc),
    "part_of_a_tensor": (lambda t: t[None, 2:], lambda t: t[None, 2:]),
    "one_transposed": (lambda t: t, lambda t: t.t().contiguous().t()),
    "one_channels_last": (lambda t: t.reshape(2, 3, 4, -1), nhwc),
    "one_with_gaps": (gaps, lambda t: t.t().contiguous().t()),
    "both_with_gaps": (gaps, gaps),
    "overlap": (lambda t: t[:1].expand(6, -1), lambda t: t[:1].expand(6, -1)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views(backend, name):
    compare(backend, *([view(t)] for view, t in zip(VIEWS[name], backend.randoms([(24, 50)] * 2), strict=True)))


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.bfloat16), (torch.float16, torch.float32)])
@pytest.mark.parametrize("swap", [False, True])
def test_a_pair_of_two_dtypes(backend, dtypes, swap):
    first, second = reversed(dtypes) if swap else dtypes
    shapes = ((2, 8, 6, 6), (5,), (1030,))
    a, b = backend.randoms(shapes, first, 1), backend.randoms(shapes, second, 2)
    compare(backend, [channels_last(t) for t in a], b)
    if backend is CPU:
        compare(backend, [a[0], a[1].double()], b[:2])


def test_dtypes_may_be_mixed_among_layers(backend):
    shapes = ((30,), (1100,), (9,), (500,), (64,))
    compare(backend, *([t.to(DTYPES[layer % 3]) for layer, t in enumerate(backend.randoms(shapes, number=n))]
                       for n in (0, 1)))  # fmt: skip


def test_expanded_and_overlapping_tensors(backend):
    (a,), (b,) = backend.randoms([(1, 4, 5)]), backend.randoms([(3, 4, 5)], number=1)
    compare(backend, [a.expand(3, 4, 5), b], [b, a.expand(3, 4, 5)])
    windows = torch.arange(12.0).as_strided((5, 4), (2, 1))
    compare(backend, [windows], [windows.flip(0)])


@st.composite
def layouts(draw):
    """A shape, and for each side how it is stored and its dtype."""
    rank = draw(st.integers(0, 4))
    shape = [draw(st.integers(0 if rank > 1 else 1, 9)) for _ in range(rank)]
    return shape, [(draw(stored(rank)), draw(st.sampled_from(CPU.dtypes))) for _ in range(2)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(layout=layouts())
def test_any_shape_stride_and_dtype(layout):
    shape, sides = layout
    generator = torch.Generator().manual_seed(3)
    tensors = [random_in(shape, *how, dtype, generator) for how, dtype in sides]
    if math.prod(shape) != 1:
        compare(CPU, tensors[:1], tensors[1:])
    found = ops.jacobian_sums(tensors[:1], tensors[1:])
    exact = reference.jacobian_sums([tensors[0].double()], [tensors[1].double()])
    assert_close(found, exact, VALUE[torch.float32])


@over(
    "shape, size, tolerance",
    cpu=product([(100,), (64, 32, 14, 14)], [1e-6], [SMALL_DIRECTION]),
    interpreted=product([(9000,)], [1e-2, 1e-3, 1e-4], [VALUE[torch.float32]]),
    cuda=product([(100,), (64, 32, 14, 14)], [1e-3], [100 * SMALL_DIRECTION]),
)
def test_small_directions_keep_their_digits(backend, shape, size, tolerance):
    (b,), (noise,) = backend.randoms([shape]), backend.randoms([shape], number=1)
    a = b * (1 + size * noise)
    expected = reference.jacobian_divergence([a.double()], [b.double()])
    assert 0.1 * size**2 < expected.item() < 3 * size**2
    found = ops.jacobian_divergence(backend.given([a]), backend.given([b]))
    assert_close(found.cpu(), expected, tolerance, floor=0)


@pytest.mark.parametrize("kind", KINDS)
@each_dtype
def test_zeros_and_empty_layers(backend, dtype, kind):
    zero, some, empty = torch.zeros(300, dtype=dtype), torch.ones(300, dtype=dtype), torch.zeros(0, 3, dtype=dtype)
    a = backend.given((zero, zero, some, some, empty), grad=True)
    b = backend.given((zero, some, zero, some, empty), grad=True)
    found = ops.jacobian_divergence(a, b, kind=kind)
    assert found.tolist() == [0, *([4.0 if kind == "direction" else 1.0] * 2), 0, 0]
    assert ops.jacobian_sums(a, b)[-1].tolist() == [0, 0, 0, 0]
    found.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in [*a, *b])


def test_nothing_but_empty_tensors(backend):
    sides = [backend.given([torch.empty(0), torch.empty(0, 3)], grad=True) for _ in range(2)]
    divergences, sums = ops.jacobian_divergence(*sides), ops.jacobian_sums(*sides)
    assert sums.tolist() == [[0] * 4] * 2
    assert divergences.tolist() == [0, 0]
    for found in (divergences, sums):
        gradients = torch.autograd.grad(found.sum(), sides[0])
        assert [g.shape for g in gradients] == [t.shape for t in sides[0]]


@pytest.mark.parametrize("kind", KINDS)
@on("cpu", "interpreted")
def test_distances_are_those_of_the_sums(backend, kind):
    a, b = (backend.randoms([(5,), *[(300,)] * 6, (1,)], number=number) for number in (0, 1))
    b[1] = 3 * a[1]
    b[2] = -a[2]
    b[3] = 0 * b[3]
    a[4], b[4] = 0 * a[4], 0 * b[4]
    a[5] = 0 * a[5]
    b[6] = a[6] * 2 + 0.1 * b[6]
    found, sums = torch.ops.lwkd.jacobian_divergence(a, b, kind)
    expected = reference.jacobian_divergence(in_float64(a), in_float64(b), kind=kind)
    assert sums.dtype == torch.float64
    assert found.dtype == torch.float32
    assert torch.equal(sums.float(), ops.jacobian_sums(a, b))
    assert_close(found, expected, VALUE[torch.float32])
    assert torch.equal(found, reference.jacobian_distance(sums, kind).float())


@over(
    "dtype, bad, place",
    cpu=product(CPU.dtypes, [math.nan, math.inf, -math.inf], [0, -1]),
    interpreted=product([torch.float32], [math.nan, math.inf, 1e30], [-1]),
    cuda=product(DTYPES, [math.nan, math.inf, -math.inf], [0, -1]),
)
def test_values_that_are_not_finite_stay_in_their_layer(backend, dtype, bad, place):
    size = 1030 if backend.name == "interpreted" else 300
    a, b = backend.randoms([(size,)] * 3, dtype), backend.randoms([(size,)] * 3, dtype, 1)
    a[1][place] = bad
    a, b = backend.given(a, grad=True), backend.given(b)
    assert torch.isfinite(ops.jacobian_sums(a, b)).all(1).tolist() == [True, False, True]
    for kind in KINDS:
        found = ops.jacobian_divergence(a, b, kind=kind)
        assert torch.isnan(found).tolist() == [False, True, False]
        assert torch.equal(found[::2], ops.jacobian_divergence(a[::2], b[::2], kind=kind))
    ops.jacobian_divergence(a, b).sum().backward()
    assert [bool(torch.isfinite(t.grad).all()) for t in a] == [True, False, True]


def test_the_same_bits_on_every_run(backend):
    a, b = (backend.given(backend.randoms([(1030,), (20001,)], number=number), grad=True) for number in (0, 1))
    runs = []
    for _ in range(2):
        sums = ops.jacobian_sums(a, b)
        runs.append([sums, *torch.autograd.grad(sums.sum(), [*a, *b])])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@on("interpreted")
def test_a_strided_gradient_of_the_sums_in_float64(backend):
    a, b = (backend.randoms([(40,), (50,)], number=number) for number in (0, 1))
    grad = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).t().double()
    found = torch.ops.lwkd.jacobian_sums_backward(grad, a, b)
    expected = torch.ops.lwkd.jacobian_sums_backward(grad.float().contiguous(), a, b)
    for side in range(2):
        assert all(torch.equal(*pair) for pair in zip(found[side], expected[side], strict=True))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_on_every_run_and_for_any_number_of_threads(threads, dtype, memory_format):
    shapes = ((2, 96, 40, 40), (2, 48, 9, 9), (2, 16, 70, 70))
    a, b = ([t.contiguous(memory_format=memory_format) for t in CPU.randoms(shapes, dtype, seed)] for seed in (1, 2))
    found = []
    for count in (1, 2, 3, 2, 1, 4):
        threads(count)
        inputs = [t.detach().requires_grad_() for t in a]
        divergence = ops.jacobian_divergence(inputs, b)
        gradients = torch.autograd.grad(divergence.sum(), inputs)
        found.append([ops.jacobian_sums(a, b), divergence.detach(), *gradients])
    for other in found[1:]:
        assert all(torch.equal(first, second) for first, second in zip(found[0], other, strict=True))
    assert_close(found[0][0], reference.jacobian_sums([t.double() for t in a], [t.double() for t in b]), VALUE[dtype])


@on("cpu", "cuda")
def test_many_layers_and_the_layers_beside(backend):
    shapes = [(1 + layer % 200,) for layer in range(512)]
    sides = backend.randoms(shapes), backend.randoms(shapes, number=1)
    ours = [backend.given(side) for side in sides]
    found = ops.jacobian_sums(*ours)
    assert_sums(backend, found, reference.jacobian_sums(*map(in_float64, sides)))
    assert torch.equal(found[[7, 501]], ops.jacobian_sums(*([side[7], side[501]] for side in ours)))


@on("cpu", "interpreted")
def test_512_layers_of_few_elements(backend):
    shapes = [(1 + layer % 5,) for layer in range(512)]
    compare(backend, backend.randoms(shapes), backend.randoms(shapes, number=1), ["sums"])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_nothing_is_copied(memory_format):
    a, b = ([t.contiguous(memory_format=memory_format)] for t in CPU.randoms(((4, 32, 16, 16),) * 2, torch.bfloat16))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ops.lwkd.jacobian_sums_backward(torch.ones(1, 4, dtype=torch.float64), a, b)
    assert not {"aten::copy_", "aten::clone", "aten::contiguous"} & {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_first_and_second_order(kind):
    a, b = (CPU.randoms(((3, 2), (4,)), torch.float64, seed) for seed in (1, 2))
    inputs = tuple(t.requires_grad_() for t in [*a, *b])
    divergence = lambda *t: ops.jacobian_divergence(t[:2], t[2:], kind=kind)  # noqa: E731
    sums = lambda *t: ops.jacobian_sums(t[:2], t[2:])  # noqa: E731
    for function in (divergence, sums):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_a_side_or_a_layer_without_gradient():
    a, b = CPU.randoms(((3,), (4,))), CPU.randoms(((3,), (4,)), number=1)
    a[1].requires_grad_()
    ops.jacobian_divergence(a, b).sum().backward()
    assert a[1].grad.abs().max() > 0
    assert [t.grad for t in (a[0], *b)] == [None] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@over("layout", cpu=LAYOUTS, cuda=["contiguous"])
def test_opcheck(backend, layout, dtype):
    a, b = (
        backend.given(LAYOUTS[layout](t) for t in backend.randoms(((2, 4, 3, 3), (5,)), dtype, seed)) for seed in (1, 2)
    )
    inputs = [[t.detach().requires_grad_() for t in side] for side in (a, b)]
    torch.library.opcheck(torch.ops.lwkd.jacobian_sums, (inputs[0], inputs[1]))
    torch.library.opcheck(torch.ops.lwkd.jacobian_divergence, (inputs[0], b, "direction"))
    for of_b in (True, False):
        torch.library.opcheck(
            torch.ops.lwkd.jacobian_sums_backward, (torch.ones(2, 4, device=backend.device), a, b, of_b)
        )


def test_compiled_into_one_graph():
    a, b = CPU.randoms(((2, 4, 3), (5,))), CPU.randoms(((2, 4, 3), (5,)), number=1)

    def loss(student, teacher):
        scaled = [2 * t for t in student]
        return (
            ops.jacobian_divergence(scaled, teacher, kind="relative").sum() + ops.jacobian_sums(scaled, teacher).sum()
        )

    assert_compiled_is_the_same(loss, a, b)


GOOD = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        (GOOD, GOOD.T, ValueError, r"layer 1: teacher: expected the shape of the student.*\[2, 3\], found \[3, 2\]"),
        (GOOD.long(), GOOD, TypeError, r"layer 1: student: expected float32.*found Long.*\.float\(\)"),
        (GOOD, GOOD.to(torch.complex64), TypeError, "layer 1: teacher.*found ComplexFloat"),
    ],
)
def test_pairs_that_are_refused(student, teacher, error, message):
    for op in (ops.jacobian_sums, ops.jacobian_divergence):
        with pytest.raises(error, match=message):
            op([GOOD, student], [GOOD, teacher])


def test_lists_kinds_and_forward_mode():
    for op in (ops.jacobian_sums, ops.jacobian_divergence):
        with pytest.raises(ValueError, match="found 2 of the student and 1 of the teacher"):
            op([GOOD, GOOD], [GOOD])
        with pytest.raises(ValueError, match="at least one layer"):
            op([], [])
        with pytest.raises(RuntimeError, match="no forward-mode rule"):
            torch.func.jvp(lambda t, op=op: op([t], [GOOD]), (GOOD,), (GOOD,))
    with pytest.raises(ValueError, match="kind 'direction', 'norm' or 'relative', found 'angle'"):
        ops.jacobian_divergence([GOOD], [GOOD], kind="angle")
    with pytest.raises(ValueError, match="2 student derivatives and 1 teacher derivatives"):
        torch.ops.lwkd.jacobian_sums([GOOD, GOOD], [GOOD])
    with pytest.raises(ValueError, match=r"jacobian_slopes: expected kind 'direction', 'norm' or 'relative'"):
        torch.ops.lwkd.jacobian_slopes(torch.ones(1, 4), torch.ones(1), "angle")
    with pytest.raises(ValueError, match=r"expected shape \(1, 4\), found \[1, 3\]"):
        torch.ops.lwkd.jacobian_slopes(torch.ones(1, 3), torch.ones(1), "norm")
    with pytest.raises(ValueError, match=r"grad: expected shape \(1, 4\), found \[4\]"):
        torch.ops.lwkd.jacobian_sums_backward(torch.ones(4), [GOOD], [GOOD])


@pytest.mark.parametrize("slopes", [torch.ops.lwkd.jacobian_slopes, slopes_on_gpu], ids=["C++", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_slopes_are_the_reference_s_derivatives(kind, slopes):
    a, b = (torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    a[::3] *= 10.0  # norms that differ by more than a factor of two
    a[1], b[2], a[3], b[3] = 0, 0, 0, 0
    a[4] = b[4]
    a[5] = -b[5]
    sums, grad = reference.jacobian_sums(list(a), list(b)).requires_grad_(), torch.linspace(-2, 3, 40)
    expected = torch.autograd.grad(reference.jacobian_distance(sums, kind), sums, grad.double())[0]
    found = slopes(sums.detach(), grad, kind)
    decided = torch.tensor([1, 2, 3, 4, 5])  # by zeros; at the ends of the range rounding decides
    kept = torch.ones(40, dtype=torch.bool).index_fill(0, decided[3:], False)
    torch.testing.assert_close(found[kept], expected[kept], rtol=1e-12, atol=1e-14)
    assert bool(torch.isfinite(found).all())
    infinite = torch.full((1, 4), float("inf"), dtype=torch.float64)
    assert bool(slopes(infinite, torch.ones(1), kind).isnan().all()), "as the distance is"
