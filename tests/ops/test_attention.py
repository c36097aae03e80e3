"""attention_divergence against the float64 reference: values and gradients."""

import math
from itertools import product

import pytest
import torch
from backends import CPU, CUDA, DTYPES, assert_gradient, in_float64, joined, moved, on, order_one, over
from cases import BLOCKS, CASES, CONV, FEW_LAYERS, LARGE, POWER_2_5, Case, build, probabilities
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import random_in, stored
from tolerances import FLOOR, GRADIENT, HALF_SPACING, SMALL_DIVERGENCE, VALUE, assert_close

from lwkd import ops, reference

KINDS = ("jsd", "l2")
CHUNKS = ((1, 256, 6, 6), (2, 96, 3, 3)), ((1, 300, 6, 6), (2, 130, 3, 3))
CUT = [Case(f"channels_in_chunks_{memory}", *CHUNKS, memory=memory) for memory in ("contiguous", "channels_last")]


def compare(backend, student, teacher, **options):
    """Value and gradient of the op against the reference in float64, every layer weighted differently."""
    exact = in_float64(student, grad=True)
    expected = reference.attention_divergence(exact, in_float64(teacher), **options)
    truths = torch.autograd.grad(expected.sum(), exact)
    ours = backend.given(student, grad=True)
    found = ops.attention_divergence(ours, backend.given(teacher), **options)
    dtypes = {f.dtype for f in [*student, *teacher]}
    assert found.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    assert found.device == ours[0].device
    together = backend.together(len(ours))
    tolerance = backend.slack * max(VALUE[dtype] for dtype in dtypes)
    for value, truth in [(found, expected)] if together else zip(found, expected, strict=True):
        assert_close(value.detach().cpu(), truth.detach(), tolerance)
    if together:
        gradients = joined(torch.autograd.grad(found.sum(), ours))
        assert_close(gradients, joined(truths), backend.slack * GRADIENT[student[0].dtype], HALF_SPACING)
        return
    weights = order_one(truths) * torch.linspace(0.5, 1, len(ours))
    least = 0.0 if dtypes == {torch.float64} else GRADIENT[torch.float32]
    for gradient, truth, weight, feature in zip(
        torch.autograd.grad(found, ours, weights.to(found)), truths, weights, ours, strict=True
    ):
        tolerance = backend.slack * max(least, backend.gradient[feature.dtype])
        floor = HALF_SPACING if backend is CUDA and feature.dtype == torch.float16 else FLOOR
        assert_gradient(gradient, truth * weight, feature, tolerance, floor)


@over(
    "case, dtype, kind",
    cpu=product([*CASES, POWER_2_5], CPU.dtypes, KINDS),
    interpreted=[
        *product([*FEW_LAYERS, POWER_2_5], [torch.float32], ["jsd"]),
        *product(FEW_LAYERS, DTYPES[1:], ["jsd"]),
        *product(CUT, [torch.float32, torch.bfloat16], ["jsd"]),
        # The distance sees maps, not features: memory orders are covered by the other one.
        *product([case for case in FEW_LAYERS if case.memory == "contiguous"], [torch.float32], ["l2"]),
        *product(BLOCKS, [torch.float32], KINDS),
        (LARGE[-1], torch.float32, "jsd"),
        (LARGE[-2], torch.float32, "l2"),
    ],
    cuda=product([*CASES, *BLOCKS, *LARGE, POWER_2_5], DTYPES, KINDS),
)
def test_divergence(backend, case, dtype, kind):
    compare(backend, *backend.built(case, dtype), power=case.power, kind=kind, betas=case.betas)


SIZES = (2, (3, 4), 7), (1, (1, 2), 17)


@over(
    "dtype, kind, sizes",
    cpu=product(CPU.dtypes, KINDS, [SIZES]),
    interpreted=[(dtype, "jsd", [(2, (2, 3), tokens)]) for dtype, tokens in product(DTYPES, (5, 8))],
    cuda=product(DTYPES, KINDS, [[*SIZES, (2, (12, 6), 64)]]),
)
def test_divergence_of_probabilities(backend, dtype, kind, sizes):
    student, teacher = zip(*(probabilities(*size, dtype) for size in sizes), strict=True)
    compare(backend, 2 * student, [*teacher, *(t.flip(0) for t in teacher)], source="probabilities", kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_with_an_empty_row(backend, kind):
    student, teacher = probabilities(1, (2, 3), 4, torch.float32)
    student[:, :, 1] = 0
    teacher[:, :, 2] = 0
    compare(backend, [student], [teacher], source="probabilities", kind=kind)


def test_a_layer_without_gradient_beside_one_with(backend):
    student, teacher = map(backend.given, backend.built(CASES[0]))
    student[1].requires_grad_()
    ops.attention_divergence(student, teacher).sum().backward()
    assert student[0].grad is None
    assert student[1].grad.abs().max() > 0


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float64)])
@pytest.mark.parametrize("swap", [False, True])
def test_student_and_teacher_of_different_dtypes(dtypes, swap):
    student, teacher = build(CASES[2])
    first, second = reversed(dtypes) if swap else dtypes
    compare(CPU, [f.to(first) for f in student], [f.to(second) for f in teacher])
    mixed = [f.to(dtype) for f, dtype in zip(student, CPU.dtypes[1:], strict=True)]
    compare(CPU, mixed, teacher)


def test_layers_of_different_dtype_memory_order_and_alignment(backend):
    forms = (("contiguous", torch.float32), ("channels_last", torch.bfloat16), ("offset", torch.float16))
    student = [
        backend.built(Case(f"mixed {memory}", ((2, 8, 5, 4),), (), memory=memory), dtype)[0][0]
        for memory, dtype in forms
    ]
    compare(backend, student, [student[1], student[2], student[0]])


def test_expanded_and_permuted_features(backend):
    one, tokens, four = backend.randoms([(1, 6, 5, 5), (3, 26, 6), (5, 3, 5, 6)])
    in_sequence = tokens[:, 1:].transpose(1, 2)  # without the class token
    views = [one.expand(3, 6, 5, 5), one[:, :1].expand(3, 6, 5, 5), one[..., :1].expand(3, 6, 5, 5)]
    views += [in_sequence.unflatten(2, (5, 5)), four.permute(1, 3, 2, 0), in_sequence]
    teachers = backend.randoms([(3, 4, 5, 5)] * 5, number=1)
    compare(backend, views, [*teachers, in_sequence.flip(2).contiguous()])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_nothing_is_copied(memory_format):
    student, teacher = (
        [torch.randn(4, channels, 16, 16).contiguous(memory_format=memory_format)] for channels in (32, 64)
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.attention_divergence(student, teacher)
    copies = {"aten::copy_", "aten::clone", "aten::contiguous", "aten::to"}
    assert not copies & {event.key for event in profile.key_averages()}


def test_backward_makes_nothing_but_the_gradients():
    """On a GPU each zero for a factor that nothing depends on would be a launch."""
    student = [feature.requires_grad_() for feature in CPU.randoms(((2, 3, 4, 4),) * 5)]
    teacher = CPU.randoms(((2, 6, 4, 4),) * 5, number=1)
    divergences, grad = ops.attention_divergence(student, teacher), torch.ones(5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(divergences, student, grad)
    called = {event.key for event in profile.key_averages()}
    assert "lwkd::attention_divergence_backward" in called
    assert called.isdisjoint({"aten::zeros", "aten::zero_", "aten::zeros_like", "aten::fill_"})


class WithoutGradient(torch.autograd.Function):
    """Its input's gradient is None, which stands for zero."""

    @staticmethod
    def forward(ctx, divergences):
        return divergences.sum()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_gradient_that_is_none_is_zero(create_graph):
    (student,), (teacher,) = CPU.randoms([(2, 3, 4, 4)]), CPU.randoms([(2, 6, 4, 4)], number=1)
    student.requires_grad_()
    total = WithoutGradient.apply(ops.attention_divergence([student], [teacher])) + 0 * student.sum()
    (gradient,) = torch.autograd.grad(total, [student], create_graph=create_graph)
    assert torch.equal(gradient, torch.zeros_like(student))


@over(
    "channels, size, positive",
    cpu=[*product((1, 64, 512), [1e-4], [False]), *product((1, 64, 512), (1e-2, 1e-4), [True])],
    interpreted=product([8], (1e-2, 1e-4), [True]),
    cuda=product((1, 64, 512), (1e-2, 1e-4), [True]),
)
def test_small_divergences_keep_three_digits(backend, channels, size, positive):
    source = backend.generator()
    shape = (4, channels, 14, 14)
    student = torch.rand(shape, generator=source) + 0.5 if positive else torch.randn(shape, generator=source)
    teacher = student * (1 + size * torch.randn(4, 1, 14, 14, generator=source))
    expected = reference.attention_divergence([student.double()], [teacher.double()])
    assert 0.01 * size**2 < expected.item() < 2 * size**2
    found = ops.attention_divergence(backend.given([student]), backend.given([teacher]))
    assert_close(found.cpu(), expected, SMALL_DIVERGENCE, floor=0)


def test_identical_and_disjoint_maps(backend):
    one, other = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    one[..., :2], other[..., 2:] = 1, 1
    point, rest = torch.tensor([[[1.0, 0.0, 0.0]]]), torch.tensor([[[0.0, 1.0, 1.0]]])
    student = backend.given([one, one, 0 * one, point, point, 0 * point])
    teacher = backend.given([one, other, torch.ones_like(one), rest, 3 * point, torch.ones(1, 2, 3)])
    found = ops.attention_divergence(student, teacher)
    farthest = math.log(2)
    within = 1e-6 if backend is CUDA else 1e-7
    assert found.tolist() == pytest.approx([0, farthest, 0, farthest, 0, 0], abs=within)
    assert found[0] == 0 or backend is CUDA
    found = ops.attention_divergence(student[1::2], teacher[1::2], kind="l2")
    assert found.tolist() == pytest.approx([2, 2, 0], rel=1e-6, abs=within)


@pytest.mark.parametrize("kind", KINDS)
@over(
    "dtype, side, bad",
    cpu=product(CPU.dtypes, (0, 1), [math.nan, math.inf, -math.inf]),
    interpreted=product([torch.float32], [0], [math.nan, math.inf]),
    cuda=product(DTYPES, (0, 1), [math.nan, math.inf, -math.inf]),
)
def test_values_that_are_not_finite_make_their_layer_nan_and_no_other(backend, dtype, side, bad, kind):
    sides = backend.built(Case("bad", *CONV), dtype)
    sides[side][1].view(-1)[5] = bad
    student, teacher = backend.given(sides[0], grad=True), backend.given(sides[1])
    found = ops.attention_divergence(student, teacher, kind=kind)
    assert torch.isnan(found).tolist() == [False, True]
    found.sum().backward()
    assert torch.isfinite(student[0].grad).all()
    assert torch.isnan(ops.attention_maps((student, teacher)[side])[1]).any()


def test_features_that_are_not_finite_end_as_a_skipped_measurement(backend):
    student = backend.given([torch.ones(1, 1, 4), torch.full((1, 1, 4), math.nan)])
    divergence = ops.attention_divergence(student, backend.given([torch.rand(1, 2, 4)] * 2))
    before = reference.initial_rates(2, 1, backend.device)
    state, multipliers, skipped = ops.update_rates(before, divergence.unsqueeze(1))
    assert int(skipped) == 1
    assert multipliers.tolist() == [1.0, 1.0]
    assert torch.isfinite(state.average).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_that_float32_does_not_hold_makes_its_layer_nan(backend, kind):
    """Each position is still finite, and divided by an infinite sum it would be 0."""
    sides = [1.5e19, 1.0, 1.0], [1.0, 1.5e19, 1.0]
    student, teacher = ([torch.linspace(value, value / 2, 4).view(1, 1, 4) for value in side] for side in sides)
    for module in (ops, reference):
        found = module.attention_divergence(backend.given(student), backend.given(teacher), kind=kind)
        assert torch.isnan(found).tolist() == [True, True, False]
        maps, moved = module.attention_maps(backend.given(student), backend.given(teacher))
        assert torch.isnan(maps[0]).all()
        assert torch.isnan(moved[0]).all()
    (given,) = backend.given(student[:1], grad=True)
    ops.attention_maps([given])[0].square().sum().backward()
    assert torch.isnan(given.grad).all()


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("conv", "channels_last_odd", "resized")])
def test_the_same_bits_on_every_run(backend, case):
    student, teacher = backend.given(build(case)[0], grad=True), backend.given(build(case)[1])
    runs = []
    for _ in range(2):
        found = ops.attention_divergence(student, teacher)
        runs.append([found, *torch.autograd.grad(found, student, found.detach())])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@on("cuda")
def test_second_derivatives_go_through_the_reference(backend):
    (student,), (teacher,) = backend.randoms([(2, 3, 4, 4)]), backend.randoms([(2, 5, 4, 4)], number=1)
    results = []
    for s, t in ((student.double(), teacher.double()), (moved(student), moved(teacher))):
        s.requires_grad_()
        divergence = (ops if s.dtype == torch.float32 else reference).attention_divergence([s], [t])
        (gradient,) = torch.autograd.grad(divergence.sum(), s, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), s)[0].cpu())
    assert_close(results[1], results[0], 1e-3)


@st.composite
def layouts(draw):
    """A feature's shape, how it is stored, and its dtype."""
    shape = [draw(st.integers(1, 3)), draw(st.integers(1, 40)), *draw(st.lists(st.integers(1, 7), max_size=3))]
    return shape, draw(stored(len(shape))), draw(st.sampled_from(CPU.dtypes))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(layout=layouts(), teacher_channels=st.integers(1, 20), shrink=st.booleans(), kind=st.sampled_from(KINDS))
def test_any_shape_stride_and_dtype(layout, teacher_channels, shrink, kind):
    shape, how, dtype = layout
    generator = torch.Generator().manual_seed(6)
    student = random_in(shape, *how, dtype, generator)
    size = [max(1, length - 1) if shrink else length for length in shape[2:]]
    teacher = random_in([shape[0], teacher_channels, *size], *how, dtype, generator)
    if math.prod(size) > 1:  # one position has one map: its gradient is rounding error alone
        compare(CPU, [student], [teacher], kind=kind)
    else:
        assert ops.attention_divergence([student], [teacher], kind=kind).abs().item() <= 1e-6
