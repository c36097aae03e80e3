"""attention_maps and attention_divergence against the float64 reference: values and gradients."""

import math

import pytest
import torch
from cases import CASES, build, probabilities
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FLOOR, GRADIENT, HALF_SPACING, SMALL_DIVERGENCE, VALUE, assert_close

from lwkd import ops, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CASES_AND_DTYPES = [pytest.param(case, dtype, id=f"{case}-{dtype}") for case in CASES for dtype in case.dtypes]


def gradient_floor(dtype):
    return HALF_SPACING if dtype == torch.float16 else FLOOR


def in_float64(features, grad=False):
    return [f.detach().double().requires_grad_(grad) for f in features]


def compare_divergence(student, teacher, **options):
    """Value and gradient of the op against the reference in float64, every layer weighted differently."""
    student = [f.detach().requires_grad_() for f in student]
    exact = in_float64(student, grad=True)
    found = ops.attention_divergence(student, teacher, **options)
    expected = reference.attention_divergence(exact, in_float64(teacher), **options)
    dtypes = {f.dtype for f in [*student, *teacher]}
    assert found.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    worst = max(dtypes, key=lambda dtype: VALUE[dtype])
    assert_close(found.detach(), expected.detach(), VALUE[worst])
    weights = torch.linspace(1, 2, len(student), dtype=torch.float64)
    gradients = torch.autograd.grad((found * weights.to(found.dtype)).sum(), student)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), exact)
    for gradient, exact_gradient, feature in zip(gradients, expected_gradients, student, strict=True):
        assert gradient.dtype == feature.dtype
        assert gradient.stride() == torch.empty_like(feature).stride()
        tolerance = max(GRADIENT[feature.dtype], GRADIENT[worst])
        assert_close(gradient, exact_gradient, tolerance, gradient_floor(feature.dtype))


@pytest.mark.parametrize("kind", ["jsd", "l2"])
@pytest.mark.parametrize(("case", "dtype"), CASES_AND_DTYPES)
def test_divergence(case, dtype, kind):
    compare_divergence(*build(case, dtype), power=case.power, kind=kind, betas=case.betas)


@pytest.mark.parametrize("kind", ["jsd", "l2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_divergence_of_probabilities(dtype, kind):
    pairs = [probabilities(batch, heads, tokens, dtype) for batch, heads, tokens in ((2, (3, 4), 7), (1, (1, 2), 17))]
    students, teachers = zip(*pairs, strict=True)
    compare_divergence(students, teachers, source="probabilities", kind=kind)


def moved(features):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(f.shape, generator=generator, dtype=torch.float64).to(f.dtype) for f in features]


@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize(("case", "dtype"), CASES_AND_DTYPES)
def test_maps_and_map_tangents(case, dtype, resize):
    features, _ = build(case, dtype)
    tangents = moved(features)
    sizes = [[(length + 1) // 2 for length in f.shape[2:]] for f in features] if resize else None
    inputs = [[f.requires_grad_() for f in side] for side in (features, tangents)]
    exact = [in_float64(side, grad=True) for side in inputs]
    options = {"power": case.power, "sizes": sizes}
    plain = ops.attention_maps(features, **options)
    found = [m for side in ops.attention_maps(*inputs, **options) for m in side]
    expected = [m for side in reference.attention_maps(*exact, **options) for m in side]
    for map_, other in zip(plain, found, strict=False):
        assert_close(map_.detach(), other.detach(), VALUE[dtype])
    for map_, exact_map in zip(found, expected, strict=True):
        assert_close(map_.detach(), exact_map.detach(), VALUE[dtype])
    cotangents = moved(expected)
    flat = [*inputs[0], *inputs[1]]
    gradients = torch.autograd.grad(found, flat, [c.to(found[0].dtype) for c in cotangents])
    exact_gradients = torch.autograd.grad(expected, [*exact[0], *exact[1]], cotangents)
    for gradient, exact_gradient, feature in zip(gradients, exact_gradients, flat, strict=True):
        assert gradient.dtype == feature.dtype
        assert gradient.stride() == torch.empty_like(feature).stride()
        if exact_gradient.abs().max() > torch.finfo(dtype).max:  # features of 1e-6 in half precision: beyond its range
            continue
        assert_close(gradient, exact_gradient, GRADIENT[dtype], gradient_floor(dtype))


def test_maps_of_which_some_are_unused():
    features = [f.requires_grad_() for f in build(CASES[0])[0]]
    exact = in_float64(features, grad=True)
    gradients = torch.autograd.grad(ops.attention_maps(features)[1].square().sum(), features)
    expected = reference.attention_maps(exact)[1].square().sum()
    assert gradients[0].abs().max() == 0
    assert_close(gradients[1], torch.autograd.grad(expected, exact[1])[0], GRADIENT[torch.float32])
    tangents = [t.requires_grad_() for t in moved(features)]
    maps, _ = ops.attention_maps(features, tangents)
    assert torch.autograd.grad(maps[0].square().sum(), tangents)[0].abs().max() == 0


def test_a_layer_without_gradient_beside_one_with():
    student, teacher = build(CASES[0])
    student[1].requires_grad_()
    ops.attention_divergence(student, teacher).sum().backward()
    assert student[0].grad is None
    assert student[1].grad.abs().max() > 0


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float64)])
@pytest.mark.parametrize("swap", [False, True])
def test_student_and_teacher_of_different_dtypes(dtypes, swap):
    student, teacher = build(CASES[2])
    first, second = reversed(dtypes) if swap else dtypes
    compare_divergence([f.to(first) for f in student], [f.to(second) for f in teacher])
    mixed = [f.to(dtype) for f, dtype in zip(student, DTYPES[1:], strict=True)]
    compare_divergence(mixed, teacher)


def test_expanded_and_permuted_features():
    generator = torch.Generator().manual_seed(4)
    one = torch.randn(1, 6, 5, 5, generator=generator)
    views = [one.expand(3, 6, 5, 5), one[:, :1].expand(3, 6, 5, 5), one[..., :1].expand(3, 6, 5, 5)]
    tokens = torch.randn(3, 26, 6, generator=generator)[:, 1:].transpose(1, 2)
    views += [tokens.unflatten(2, (5, 5)), torch.randn(5, 3, 5, 6, generator=generator).permute(1, 3, 2, 0)]
    teachers = [torch.randn(3, 4, 5, 5, generator=generator) for _ in views]
    compare_divergence(views, teachers)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_nothing_is_copied(memory_format):
    student, teacher = (
        [torch.randn(4, channels, 16, 16).contiguous(memory_format=memory_format)] for channels in (32, 64)
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.attention_divergence(student, teacher)
    copies = {"aten::copy_", "aten::clone", "aten::contiguous", "aten::to"}
    assert not copies & {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("channels", [1, 64, 512])
def test_small_divergences_keep_three_digits(channels):
    generator = torch.Generator().manual_seed(5)
    student = torch.randn(4, channels, 14, 14, generator=generator)
    teacher = student * (1 + 1e-4 * torch.randn(4, 1, 14, 14, generator=generator))
    expected = reference.attention_divergence([student.double()], [teacher.double()])
    assert 1e-10 < expected.item() < 1e-7
    assert_close(ops.attention_divergence([student], [teacher]), expected, SMALL_DIVERGENCE, floor=0)


def test_closed_forms():
    one, other = torch.tensor([[[1.0, 0.0, 0.0]]]), torch.tensor([[[0.0, 1.0, 1.0]]])
    found = ops.attention_divergence([one, one, 0 * one], [other, 3 * one, torch.ones(1, 2, 3)])
    assert found.tolist() == pytest.approx([math.log(2), 0, 0], abs=1e-7)
    assert ops.attention_divergence([one], [other], kind="l2").item() == pytest.approx(2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("kind", ["jsd", "l2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_make_their_layer_nan(dtype, kind, side, bad):
    sides = build(CASES[0], dtype)
    sides[side][1].view(-1)[5] = bad
    student = [f.requires_grad_() for f in sides[0]]
    found = ops.attention_divergence(student, sides[1], kind=kind)
    assert torch.isnan(found).tolist() == [False, True]
    found.sum().backward()
    assert torch.isfinite(student[0].grad).all()
    maps = ops.attention_maps(sides[side])
    assert torch.isnan(maps[1]).any()


@st.composite
def layouts(draw):
    """A feature shape, the dimension order in which it is stored, steps between its elements, and a dtype."""
    rank = draw(st.integers(0, 3))
    shape = [draw(st.integers(1, 3)), draw(st.integers(1, 40)), *(draw(st.integers(1, 7)) for _ in range(rank))]
    order = draw(st.permutations(range(rank + 2)))
    steps = [draw(st.integers(1, 2)) for _ in range(rank + 2)]
    return shape, order, steps, draw(st.sampled_from(DTYPES))


def laid_out(shape, order, steps, dtype, generator):
    stored = torch.randn([shape[d] * steps[d] for d in order], generator=generator, dtype=torch.float64).to(dtype)
    feature = stored.permute([order.index(d) for d in range(len(shape))])
    return feature[tuple(slice(None, None, step) for step in steps)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(layout=layouts(), teacher_channels=st.integers(1, 20), shrink=st.booleans(), kind=st.sampled_from(["jsd", "l2"]))
def test_any_shape_stride_and_dtype(layout, teacher_channels, shrink, kind):
    shape, order, steps, dtype = layout
    generator = torch.Generator().manual_seed(6)
    student = laid_out(shape, order, steps, dtype, generator)
    size = [max(1, length - 1) if shrink else length for length in shape[2:]]
    teacher = laid_out([shape[0], teacher_channels, *size], order, steps, dtype, generator)
    if math.prod(size) > 1:  # one position has one map: its gradient is rounding error alone
        compare_divergence([student], [teacher], kind=kind)
    else:
        assert ops.attention_divergence([student], [teacher], kind=kind).abs().item() <= 1e-6
