"""attention_maps, with and without tangents, against the float64 reference: values and gradients."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from backends import CPU, DTYPES, assert_gradient, in_float64, joined, order_one, over
from cases import BLOCKS, CASES, FEW_LAYERS, LARGE, POWER_2_5, Case, build
from tolerances import FLOOR, GRADIENT, HALF_SPACING, VALUE, assert_close

from lwkd import ops, reference

BY_NAME = {case.name: case for case in CASES}


def halved(features):
    return [tuple((length + 1) // 2 for length in f.shape[2:]) for f in features]


def tangents_of(backend, case, dtype=torch.float32):
    return backend.built(replace(case, name=f"{case.name}, tangents", values="normal"), dtype)[0]


def compare(backend, features, tangents, power=2.0, sizes=None):
    """Maps, their tangents if there are any, and the gradients of all inputs."""
    layers, options = len(features), {"power": power, "sizes": sizes}

    def run(attention_maps, inputs):
        if not tangents:
            return attention_maps(inputs, **options)
        return [m for side in attention_maps(inputs[:layers], inputs[layers:], **options) for m in side]

    exact = in_float64([*features, *tangents], grad=True)
    ours = backend.given([*features, *tangents], grad=True)
    expected, found = run(reference.attention_maps, exact), run(ops.attention_maps, ours)
    assert {m.dtype for m in found} == {torch.float64 if features[0].dtype == torch.float64 else torch.float32}
    together = backend.together(layers)
    sides = [(joined(found), joined(expected))] if together else zip(found, expected, strict=True)
    for map_, truth in sides:
        assert_close(map_.detach().cpu(), truth.detach(), backend.slack * VALUE[features[0].dtype])

    cotangents = backend.randoms([m.shape for m in expected], torch.float64, number=1)
    truths = torch.autograd.grad(expected, exact, cotangents)
    # Gradients of order one leave float16 room; features and tangents of a layer share their scale. On the CPU they are
    # as they come.
    scaling = not together and backend is not CPU
    scales = order_one(joined(truths[layer::layers]) for layer in range(layers)) if scaling else torch.ones(layers)
    scales = scales.tolist() * (2 if tangents else 1)
    scaled = [(cotangent * scale).to(found[0]) for cotangent, scale in zip(cotangents, scales, strict=True)]
    gradients = torch.autograd.grad(found, ours, scaled)
    if together:
        tolerance = backend.slack * GRADIENT[features[0].dtype]
        assert_close(joined(gradients), joined(truths), tolerance, HALF_SPACING)
        return
    for gradient, truth, tensor, scale in zip(gradients, truths, ours, scales, strict=True):
        if truth.abs().max() * scale > torch.finfo(tensor.dtype).max:  # of 1 / 1e-6 in half precision
            continue
        floor = HALF_SPACING if tensor.dtype == torch.float16 else FLOOR
        if (
            scaling and scale == 1
        ):  # it cancels to zero (a map of one position) and keeps the rounding of what cancelled
            floor = VALUE[torch.float32]
        assert_gradient(gradient, truth * scale, tensor, backend.slack * backend.gradient[tensor.dtype], floor)


@over(
    "case, dtype, resize",
    cpu=product([*CASES, POWER_2_5], CPU.dtypes, [False, True]),
    interpreted=[
        *product([*CASES, POWER_2_5, *BLOCKS], [torch.float32], [False]),
        *product(FEW_LAYERS, DTYPES[1:], [False]),
    ],
    cuda=product([*CASES, *BLOCKS, *LARGE], DTYPES, [False, True]),
)
def test_maps_and_map_tangents(backend, case, dtype, resize):
    features = backend.built(case, dtype)[0]
    compare(backend, features, tangents_of(backend, case, dtype), case.power, halved(features) if resize else None)


WITHOUT = ("conv", "odd", "channels_last", "zeros", "magnitude_1e-6", "power_3")


@over(
    "case, dtype, resize",
    cpu=product(CASES, CPU.dtypes, [False, True]),
    interpreted=[(case, torch.float32, False) for case in [*(BY_NAME[name] for name in WITHOUT), BLOCKS[-1]]],
    cuda=product([*CASES, *BLOCKS, *LARGE], DTYPES, [False, True]),
)
def test_maps_without_tangents(backend, case, dtype, resize):
    features = backend.built(case, dtype)[0]
    compare(backend, features, [], case.power, halved(features) if resize else None)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_resized(backend, memory):
    case = Case("to_sizes", ((2, 6, 8, 8), (1, 4, 5, 7), (1, 4, 6), (1, 3, 2, 3, 2)), (), memory=memory)
    sizes = [(4, 4), (7, 3), (6,), (1, 2, 5)]
    for tangents in (tangents_of(backend, case), []):
        compare(backend, backend.built(case)[0], tangents, sizes=sizes)


@over(
    "case, dtype, resize",
    cpu=product([case for case in CASES if case.memory != "contiguous"], CPU.dtypes, [False, True]),
    interpreted=[(BY_NAME["conv"], torch.float32, False)],
    cuda=[(BY_NAME["conv"], torch.float32, False)],
)
def test_tangents_in_another_memory_order(backend, case, dtype, resize):
    features = backend.built(case, dtype)[0]
    other = replace(case, memory="channels_last" if case.memory == "contiguous" else "contiguous")
    sizes = halved(features) if resize else None
    compare(backend, features, tangents_of(backend, other, dtype), case.power, sizes)


def test_maps_of_which_some_are_unused(backend):
    features, tangents = backend.built(BY_NAME["conv"])[0], tangents_of(backend, BY_NAME["conv"])
    ours, exact = backend.given(features, grad=True), in_float64(features, grad=True)
    gradients = torch.autograd.grad(ops.attention_maps(ours)[1].square().sum(), ours)
    expected = reference.attention_maps(exact)[1].square().sum()
    assert gradients[0].abs().max() == 0
    tolerance = backend.slack * GRADIENT[torch.float32]
    assert_close(gradients[1].cpu(), torch.autograd.grad(expected, exact[1])[0], tolerance)
    tangents = backend.given(tangents, grad=True)
    maps, _ = ops.attention_maps(ours, tangents)
    assert torch.autograd.grad(maps[0].square().sum(), tangents)[0].abs().max() == 0


def test_totals_of_the_maps_before_they_were_normalised():
    """What backward goes on from, on the CPU: at the size that was asked for, and 0 of a map that counts as empty."""
    student, _ = build(BY_NAME["odd"])
    features, moved = [student[0], 1e-14 * student[0]], [torch.ones_like(student[0])] * 2
    flat = [n for f in features for n in (3, *f.shape[3:])]
    _, _, totals = torch.ops.lwkd.attention_maps(features, moved, 2.0, flat)
    maps = features[0].double().square().sum(1)
    moving = 2 * features[0].double().sum(1)
    expected = [torch.nn.functional.adaptive_avg_pool2d(one, flat[:2]).sum((1, 2)) for one in (maps, moving)]
    assert totals.dtype == torch.float64
    torch.testing.assert_close(totals[: len(maps)], torch.stack(expected, 1), rtol=1e-5, atol=1e-4)
    assert totals[len(maps) :, 0].abs().max() == 0


def test_every_number_of_float16_in_every_place_of_a_vector():
    """Channels adjacent, 16 and 8 at a time: bit by bit what these numbers give in float32, rounded as torch does."""
    number = torch.arange(2**16)
    feature = torch.zeros(len(number), 2, 24, dtype=torch.float16)
    feature[number, 0, number % 24] = number.to(torch.int16).view(torch.float16)
    feature[:, 1, 0] = 1
    narrow = feature.transpose(1, 2).requires_grad_()
    wide = feature.float().transpose(1, 2).requires_grad_()
    maps, exact = ops.attention_maps([narrow])[0], ops.attention_maps([wide])[0]
    torch.testing.assert_close(maps, exact, rtol=0, atol=0, equal_nan=True)
    cotangent = torch.randn(maps.shape, generator=torch.Generator().manual_seed(0)) * 10.0 ** (number % 15 - 7)[:, None]
    (found,), (gradient,) = (torch.autograd.grad(*of, cotangent) for of in ((maps, narrow), (exact, wide)))
    expected = gradient.half()
    assert expected.isinf().sum() > 1000
    assert ((expected != 0) & (expected.abs() < 2**-14)).sum() > 1000
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_the_same_bits_on_every_run(backend):
    inputs = backend.given([*build(BY_NAME["odd"])[0], *tangents_of(backend, BY_NAME["odd"])], grad=True)
    runs = []
    for _ in range(2):
        maps, moved = ops.attention_maps(inputs[:3], inputs[3:])
        gradients = torch.autograd.grad([*maps, *moved], inputs, [m.detach() for m in (*moved, *maps)])
        runs.append([*maps, *moved, *gradients])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_sizes_of_other_ranks(backend):
    features = backend.given(build(BY_NAME["conv"])[0])
    with pytest.raises(ValueError, match=r"expected 4 sizes, one for every spatial dimension.* found 3"):
        torch.ops.lwkd.attention_maps(features, [], 2.0, [6, 6, 3])
