"""jacobian_sums and jacobian_divergence against the float64 reference: values, gradients and how they run."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, channels_last
from tolerances import FLOOR, GRADIENT, HALF_SPACING, SMALL_DIRECTION, VALUE, assert_close

from lwkd import ops, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
KINDS = ("direction", "norm", "relative")
SHAPES = ((), (1,), (7,), (16,), (129,), (3, 0, 4), (2, 8, 6, 6), (3, 5, 7, 5), (2, 3, 4, 5, 6))


def randoms(shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def compare(a, b):
    """Sums, divergences and their gradients against the reference in float64, every entry weighted differently."""
    a, b = ([t.detach().requires_grad_() for t in side] for side in (a, b))
    exact_a, exact_b = ([t.detach().double().requires_grad_() for t in side] for side in (a, b))
    dtypes = {t.dtype for t in [*a, *b]}
    result = torch.float64 if torch.float64 in dtypes else torch.float32
    sums, expected = ops.jacobian_sums(a, b), reference.jacobian_sums(exact_a, exact_b)
    assert sums.dtype == result
    worst = max(dtypes, key=lambda dtype: GRADIENT[dtype])
    assert_close(sums.detach(), expected.detach(), VALUE[worst])
    weights = torch.linspace(-1, 2, expected.numel(), dtype=torch.float64).view_as(expected)
    pairs = [(sums, expected, weights)]
    for kind in KINDS:
        found = ops.jacobian_divergence(a, b, kind=kind)
        exact = reference.jacobian_divergence(exact_a, exact_b, kind=kind)
        assert found.dtype == result
        assert_close(found.detach(), exact.detach(), VALUE[worst])
        pairs.append((found, exact, weights[:, 1]))
    for found, exact, weight in pairs:
        gradients = torch.autograd.grad((found * weight.to(found.dtype)).sum(), [*a, *b])
        expected_gradients = torch.autograd.grad((exact * weight).sum(), [*exact_a, *exact_b])
        for gradient, exact_gradient, tensor in zip(gradients, expected_gradients, [*a, *b], strict=True):
            assert gradient.dtype == tensor.dtype
            assert gradient.stride() == torch.empty_like(tensor).stride()
            if tensor.numel():
                floor = HALF_SPACING if tensor.dtype == torch.float16 else FLOOR
                assert_close(gradient, exact_gradient, max(GRADIENT[tensor.dtype], GRADIENT[worst]), floor)


@pytest.mark.parametrize("layout_b", LAYOUTS)
@pytest.mark.parametrize("layout_a", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_dtypes_and_layouts(dtype, layout_a, layout_b):
    # One element has only two directions: what its gradient should be is zero, and what is computed is rounding.
    shapes = [shape for shape in SHAPES if math.prod(shape) != 1]
    a, b = randoms(shapes, dtype, 1), randoms(shapes, dtype, 2)
    compare([LAYOUTS[layout_a](t) for t in a], [LAYOUTS[layout_b](t) for t in b])


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.bfloat16), (torch.float16, torch.float32)])
@pytest.mark.parametrize("swap", [False, True])
def test_a_pair_of_two_dtypes(dtypes, swap):
    first, second = reversed(dtypes) if swap else dtypes
    a, b = randoms(((2, 8, 6, 6), (5,)), first, 1), randoms(((2, 8, 6, 6), (5,)), second, 2)
    compare([channels_last(t) for t in a], b)
    compare([a[0], a[1].double()], b)


def test_expanded_and_overlapping_tensors():
    (a,) = randoms(((1, 4, 5),))
    (b,) = randoms(((3, 4, 5),), seed=1)
    compare([a.expand(3, 4, 5), b], [b, a.expand(3, 4, 5)])
    windows = torch.arange(12.0).as_strided((5, 4), (2, 1))
    compare([windows], [windows.flip(0)])


@st.composite
def layouts(draw):
    """A shape, and for each side the order in which its dimensions are stored, steps between elements and a dtype."""
    rank = draw(st.integers(0, 4))
    shape = [draw(st.integers(0 if rank > 1 else 1, 9)) for _ in range(rank)]
    sides = [
        (
            draw(st.permutations(range(rank))),
            [draw(st.integers(1, 2)) for _ in range(rank)],
            draw(st.sampled_from(DTYPES)),
        )
        for _ in range(2)
    ]
    return shape, sides


@settings(max_examples=100, deadline=None, derandomize=True)
@given(layout=layouts())
def test_any_shape_stride_and_dtype(layout):
    shape, sides = layout
    generator = torch.Generator().manual_seed(3)
    tensors = []
    for order, steps, dtype in sides:
        stored = torch.randn([shape[d] * steps[d] for d in order], generator=generator, dtype=torch.float64).to(dtype)
        tensor = stored.permute([order.index(d) for d in range(len(shape))])
        tensors.append(tensor[tuple(slice(None, None, step) for step in steps)])
    if math.prod(shape) != 1:
        compare(tensors[:1], tensors[1:])
    found = ops.jacobian_sums(tensors[:1], tensors[1:])
    exact = reference.jacobian_sums([tensors[0].double()], [tensors[1].double()])
    assert_close(found, exact, VALUE[torch.float32])


@pytest.mark.parametrize("shape", [(100,), (64, 32, 14, 14)])
def test_small_directions_keep_their_digits(shape):
    (b,), (noise,) = randoms((shape,)), randoms((shape,), seed=1)
    a = b * (1 + 1e-6 * noise)
    expected = reference.jacobian_divergence([a.double()], [b.double()])
    assert 1e-13 < expected.item() < 1e-11
    assert_close(ops.jacobian_divergence([a], [b]), expected, SMALL_DIRECTION, floor=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros(dtype, kind):
    zero, some = torch.zeros(300, dtype=dtype), torch.ones(300, dtype=dtype)
    empty = torch.zeros(0, dtype=dtype)
    a, b = (
        [t.clone().requires_grad_() for t in side]
        for side in ((zero, zero, some, some, empty), (zero, some, zero, some, empty))
    )
    found = ops.jacobian_divergence(a, b, kind=kind)
    assert found.tolist() == [0, *([4.0 if kind == "direction" else 1.0] * 2), 0, 0]
    assert ops.jacobian_sums(a, b)[-1].tolist() == [0, 0, 0, 0]
    found.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in [*a, *b])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 299])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_stay_in_their_layer(dtype, place, bad):
    a, b = randoms(((300,),) * 3, dtype), randoms(((300,),) * 3, dtype, 1)
    a[1][place] = bad
    a = [t.requires_grad_() for t in a]
    assert torch.isfinite(ops.jacobian_sums(a, b)).all(1).tolist() == [True, False, True]
    for kind in KINDS:
        assert torch.isnan(ops.jacobian_divergence(a, b, kind=kind)).tolist() == [False, True, False]
    ops.jacobian_divergence(a, b).sum().backward()
    assert [bool(torch.isfinite(t.grad).all()) for t in a] == [True, False, True]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_on_every_run_and_for_any_number_of_threads(dtype, memory_format):
    shapes = ((2, 96, 40, 40), (2, 48, 9, 9), (2, 16, 70, 70))
    a, b = ([t.contiguous(memory_format=memory_format) for t in randoms(shapes, dtype, seed)] for seed in (1, 2))
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2, 1, 4):
            torch.set_num_threads(count)
            inputs = [t.detach().requires_grad_() for t in a]
            divergence = ops.jacobian_divergence(inputs, b)
            gradients = torch.autograd.grad(divergence.sum(), inputs)
            found.append([ops.jacobian_sums(a, b), divergence.detach(), *gradients])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(first, second) for first, second in zip(found[0], other, strict=True))
    assert_close(found[0][0], reference.jacobian_sums([t.double() for t in a], [t.double() for t in b]), VALUE[dtype])


def test_many_layers_and_the_layers_beside():
    shapes = [(1 + layer % 200,) for layer in range(512)]
    a, b = randoms(shapes), randoms(shapes, seed=1)
    found = ops.jacobian_sums(a, b)
    assert_close(found, reference.jacobian_sums(a, b), VALUE[torch.float32])
    assert torch.equal(found[[7, 501]], ops.jacobian_sums([a[7], a[501]], [b[7], b[501]]))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_nothing_is_copied(memory_format):
    a, b = ([t.contiguous(memory_format=memory_format)] for t in randoms(((4, 32, 16, 16),) * 2, torch.bfloat16))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ops.lwkd.jacobian_sums_backward(torch.ones(1, 4, dtype=torch.float64), a, b)
    assert not {"aten::copy_", "aten::clone", "aten::contiguous"} & {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_first_and_second_order(kind):
    a, b = (randoms(((3, 2), (4,)), torch.float64, seed) for seed in (1, 2))
    inputs = tuple(t.requires_grad_() for t in [*a, *b])
    divergence = lambda *t: ops.jacobian_divergence(t[:2], t[2:], kind=kind)  # noqa: E731
    sums = lambda *t: ops.jacobian_sums(t[:2], t[2:])  # noqa: E731
    for function in (divergence, sums):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_a_side_or_a_layer_without_gradient():
    a, b = randoms(((3,), (4,))), randoms(((3,), (4,)), seed=1)
    a[1].requires_grad_()
    ops.jacobian_divergence(a, b).sum().backward()
    assert a[1].grad.abs().max() > 0
    assert [t.grad for t in (a[0], *b)] == [None] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, dtype):
    a, b = ([LAYOUTS[layout](t) for t in randoms(((2, 4, 3, 3), (5,)), dtype, seed)] for seed in (1, 2))
    inputs = [[t.detach().requires_grad_() for t in side] for side in (a, b)]
    torch.library.opcheck(torch.ops.lwkd.jacobian_sums, (inputs[0], inputs[1]))
    torch.library.opcheck(torch.ops.lwkd.jacobian_divergence, (inputs[0], b, "direction"))
    torch.library.opcheck(torch.ops.lwkd.jacobian_sums_backward, (torch.ones(2, 4), a, b))


def test_compiled_into_one_graph():
    torch._dynamo.reset()
    a, b = randoms(((2, 4, 3), (5,))), randoms(((2, 4, 3), (5,)), seed=1)

    def loss(student, teacher):
        scaled = [2 * t for t in student]
        return (
            ops.jacobian_divergence(scaled, teacher, kind="relative").sum() + ops.jacobian_sums(scaled, teacher).sum()
        )

    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        inputs = [t.detach().requires_grad_() for t in a]
        value = run(inputs, b)
        value.backward()
        results.append([value.detach(), *(t.grad for t in inputs)])
    for eager, compiled in zip(*results, strict=True):
        assert_close(compiled, eager, VALUE[torch.float32])


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
    with pytest.raises(ValueError, match=r"grad: expected shape \(1, 4\), found \[4\]"):
        torch.ops.lwkd.jacobian_sums_backward(torch.ones(4), [GOOD], [GOOD])
