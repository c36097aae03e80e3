"""Attention ops on the GPU against the float64 reference on the CPU: values, gradients, tangents, over all cases."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import CASES, CONV, Case, probabilities
from device_inputs import DTYPES, all_moved, fresh, generator, moved, randoms
from tolerances import FLOOR, GRADIENT, HALF_SPACING, ROUNDING, SMALL_DIVERGENCE, VALUE, assert_close

from lwkd import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned")

# Sizes at which a layer is cut into many programs, and at which nothing is a multiple of a vector.
STAGES = ((4, 64, 56, 56), (4, 128, 28, 28), (4, 512, 7, 7)), ((4, 256, 56, 56), (4, 96, 14, 14), (4, 2048, 7, 7))
LARGE = (
    Case("stages", *STAGES),
    Case("stages_channels_last", *STAGES, memory="channels_last"),
    Case("stages_unaligned", *STAGES, memory="offset"),
    Case("deep", ((1, 1000, 6, 6), (2, 96, 3, 3)), ((1, 300, 6, 6), (2, 1300, 3, 3))),
    Case("map_beyond_a_block", ((1, 2, 80, 77),), ((1, 5, 80, 77),)),
    Case("map_resized_from_beyond_a_block", ((1, 3, 90, 70),), ((1, 2, 64, 70),), memory="channels_last"),
    Case("512_layers", ((1, 2, 2, 1),) * 512, ((1, 3, 2, 1),) * 512),
)
CASES_AND_DTYPES = [pytest.param(c, dtype, id=f"{c}-{dtype}") for c in (*CASES, *LARGE) for dtype in DTYPES]
MANY = 100
"""Layers from which on results are judged together: among so many tiny random maps there is always one whose tangent or
gradient is a difference of nearly equal numbers, and has few digits."""
BY_NAME = {case.name: case for case in (*CASES, *LARGE)}

SLACK = 3
"""The random inputs of a run may be less kind than the fixed ones that tolerances were made for."""


def in_float64(tensors, grad=False):
    return [t.detach().double().requires_grad_(grad) for t in tensors]


def on_device(tensors):
    return [t.requires_grad_() for t in all_moved(tensors)]


def assert_values(found, expected):
    """Layer by layer, or all together."""
    if len(found) > MANY:
        found, expected = ([torch.cat([t.flatten() for t in side])] for side in (found, expected))
    for value, truth in zip(found, expected, strict=True):
        assert_close(value.detach().cpu(), truth.detach(), SLACK * VALUE[torch.float32])


def scales_of(gradients):
    """Gradients of order one, layer by layer, as loss scaling makes them: float16 has no room for less."""
    largest = torch.tensor([float(g.abs().max()) for g in gradients])
    return torch.where(largest > ROUNDING, 1 / largest, torch.ones_like(largest))


def assert_gradient(found, expected, feature, floor=FLOOR):
    assert found.dtype == feature.dtype
    assert found.stride() == torch.empty_like(feature).stride()
    floor = max(floor, HALF_SPACING) if found.dtype == torch.float16 else floor
    assert_close(found.cpu(), expected, SLACK * GRADIENT[found.dtype], floor)


def check_divergence(student, teacher, **options):
    exact = in_float64(student, grad=True)
    expected = reference.attention_divergence(exact, in_float64(teacher), **options)
    expected_gradients = torch.autograd.grad(expected.sum(), exact)
    ours = on_device(student)
    found = ops.attention_divergence(ours, all_moved(teacher), **options)
    assert (found.dtype, found.device) == (torch.float32, ours[0].device)
    assert_values(found.unbind(), expected.unbind())
    if len(ours) > MANY:
        gradients = torch.autograd.grad(found.sum(), ours)
        together = [torch.cat([g.cpu().flatten() for g in side]) for side in (gradients, expected_gradients)]
        assert_close(*together, SLACK * GRADIENT[student[0].dtype], HALF_SPACING)
        return
    scale = scales_of(expected_gradients)
    gradients = torch.autograd.grad(found, ours, moved(scale))
    for gradient, truth, feature, s in zip(gradients, expected_gradients, ours, scale, strict=True):
        assert_gradient(gradient, truth * s, feature)


@pytest.mark.parametrize("kind", ["jsd", "l2"])
@pytest.mark.parametrize(("case", "dtype"), CASES_AND_DTYPES)
def test_divergence(case, dtype, kind):
    check_divergence(*fresh(case, dtype), power=case.power, kind=kind, betas=case.betas)


@pytest.mark.parametrize("kind", ["jsd", "l2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_divergence_of_probabilities(dtype, kind):
    sizes = ((2, (3, 4), 7), (1, (1, 2), 17), (2, (12, 6), 64))
    student, teacher = zip(*(probabilities(*size, dtype) for size in sizes), strict=True)
    check_divergence(list(student), list(teacher), source="probabilities", kind=kind)


@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize(("case", "dtype"), CASES_AND_DTYPES)
def test_maps_and_map_tangents(case, dtype, resize):
    features, tangents = (
        fresh(case, dtype)[0],
        fresh(replace(case, name=f"{case.name}, tangents", values="normal"), dtype)[0],
    )
    sizes = [tuple((n + 1) // 2 if resize else n for n in f.shape[2:]) for f in features]
    exact = in_float64([*features, *tangents], grad=True)
    layers, options = len(features), {"power": case.power, "sizes": sizes}
    maps, map_tangents = reference.attention_maps(exact[:layers], exact[layers:], **options)
    expected = [*maps, *map_tangents]
    ours = on_device([*features, *tangents])
    found_maps, found_tangents = ops.attention_maps(ours[:layers], ours[layers:], **options)
    plain = ops.attention_maps(ours[:layers], **options)
    found = [*found_maps, *found_tangents]
    for side, truth in ((found_maps, maps), (found_tangents, map_tangents), (plain, maps)):
        assert_values(side, truth)

    cotangents = randoms([m.shape for m in expected], torch.float64, number=1)
    gradients = torch.autograd.grad(expected, exact, cotangents)
    if layers > MANY:
        found_gradients = torch.autograd.grad(found, ours, [c.float().to(ours[0].device) for c in cotangents])
        together = [torch.cat([g.cpu().flatten() for g in side]) for side in (found_gradients, gradients)]
        assert_close(*together, SLACK * GRADIENT[dtype], HALF_SPACING)
        return
    sizes_of_gradients = [max(float(g.abs().max()) for g in gradients[layer::layers]) for layer in range(layers)]
    scales = [1 / size if size > ROUNDING else 1.0 for size in sizes_of_gradients] * 2
    # A gradient that cancels to zero (a map of one position) keeps the rounding of what was cancelled.
    floors = [FLOOR if size > ROUNDING else VALUE[torch.float32] for size in sizes_of_gradients] * 2
    scaled = [(c * s).float().to(ours[0].device) for c, s in zip(cotangents, scales, strict=True)]
    for gradient, truth, given, s, floor in zip(
        torch.autograd.grad(found, ours, scaled), gradients, ours, scales, floors, strict=True
    ):
        assert_gradient(gradient, truth * s, given, floor)


def test_power_that_is_not_whole():
    check_divergence(*fresh(BY_NAME["relu"]), power=2.5)


def test_layers_of_different_dtype_memory_order_and_alignment():
    forms = (("contiguous", torch.float32), ("channels_last", torch.bfloat16), ("offset", torch.float16))
    student = [
        fresh(Case(f"mixed {memory}", ((2, 8, 5, 4),), (), memory=memory), dtype)[0][0] for memory, dtype in forms
    ]
    check_divergence(student, [student[1], student[2], student[0]])


def test_expanded_and_permuted_features():
    one, tokens, four = randoms([(1, 6, 5, 5), (3, 26, 6), (5, 3, 5, 6)])
    views = [one.expand(3, 6, 5, 5), one[:, :1].expand(3, 6, 5, 5), one[..., :1].expand(3, 6, 5, 5)]
    views += [tokens[:, 1:].transpose(1, 2).unflatten(2, (5, 5)), four.permute(1, 3, 2, 0)]
    check_divergence(views, randoms([(3, 4, 5, 5)] * len(views), number=1))


def test_a_layer_without_gradient_beside_one_with():
    student, teacher = (all_moved(side) for side in fresh(BY_NAME["conv"]))
    student[1].requires_grad_()
    ops.attention_divergence(student, teacher).sum().backward()
    assert student[0].grad is None
    assert student[1].grad.abs().max() > 0


@pytest.mark.parametrize("size", [1e-2, 1e-4])
@pytest.mark.parametrize("channels", [1, 64, 512])
def test_small_divergences_keep_three_digits(channels, size):
    source = generator()
    student = torch.rand(4, channels, 14, 14, generator=source) + 0.5
    teacher = student * (1 + size * torch.randn(4, 1, 14, 14, generator=source))
    expected = reference.attention_divergence([student.double()], [teacher.double()])
    found = ops.attention_divergence([moved(student)], [moved(teacher)])
    assert 0 < expected.item() < 2 * size**2
    assert_close(found.cpu(), expected, SMALL_DIVERGENCE, floor=0)


def test_identical_and_disjoint_maps():
    one, other = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    one[..., :2], other[..., 2:] = 1, 1
    found = ops.attention_divergence(all_moved([one, one, 0 * one]), all_moved([one, other, torch.ones_like(one)]))
    assert found.tolist() == pytest.approx([0, math.log(2), 0], abs=1e-6)
    assert ops.attention_divergence([moved(one)], [moved(other)], kind="l2").item() == pytest.approx(2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("kind", ["jsd", "l2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_make_their_layer_nan_and_no_other(dtype, kind, side, bad):
    sides = fresh(Case("bad", *CONV), dtype)
    sides[side][1].view(-1)[5] = bad
    student, teacher = on_device(sides[0]), all_moved(sides[1])
    found = ops.attention_divergence(student, teacher, kind=kind)
    assert torch.isnan(found).tolist() == [False, True]
    found.sum().backward()
    assert torch.isfinite(student[0].grad).all()


def test_second_derivatives_go_through_the_reference():
    (student,), (teacher,) = randoms([(2, 3, 4, 4)]), randoms([(2, 5, 4, 4)], number=1)
    results = []
    for s, t in ((student.double(), teacher.double()), (moved(student), moved(teacher))):
        s.requires_grad_()
        divergence = (ops if s.dtype == torch.float32 else reference).attention_divergence([s], [t])
        (gradient,) = torch.autograd.grad(divergence.sum(), s, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), s)[0].cpu())
    assert_close(results[1], results[0], 1e-3)


@pytest.mark.usefixtures("cuda")
def test_fresh_memory_is_poisoned():
    """Through the dispatcher, where at::empty of C++ arrives as well."""
    assert torch.ops.aten.empty.memory_format([5], device="cuda").isnan().all()
    assert torch.empty_like(torch.ones(3, device="cuda")).isnan().all()
