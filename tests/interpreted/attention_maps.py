"""Attention map kernels with and without tangents, forward and backward, against the reference in float64."""

from dataclasses import replace

import pytest
import torch
from cases import CASES, Case, build
from standin import on_cuda
from tolerances import GRADIENT, HALF_SPACING, ROUNDING, TRUNCATING_CAST, VALUE, assert_close

from lwkd import reference

GRADIENT = GRADIENT | {torch.bfloat16: TRUNCATING_CAST}
SMALL = [case for case in CASES if len(case.student) < 10]
BY_NAME = {case.name: case for case in CASES}


def tangents_of(case, dtype=torch.float32):
    return build(replace(case, name=f"{case.name}, tangents", values="normal"), dtype)[0]


def check(features, tangents, power=2.0, sizes=None):
    sizes = [tuple(f.shape[2:]) for f in features] if sizes is None else sizes
    flat = [n for size in sizes for n in size]
    wide = [feature.double().requires_grad_() for feature in features]
    wide_tangents = [tangent.double().requires_grad_() for tangent in tangents]
    expected = reference.attention_maps(wide, wide_tangents or None, power=power, sizes=sizes)
    expected_maps, expected_moved = expected if tangents else (expected, [])
    maps, moved = on_cuda("attention_maps", features, tangents, power, flat)
    for found, truth in zip([*maps, *moved], [*expected_maps, *expected_moved], strict=True):
        assert found.dtype == torch.float32
        assert_close(found, truth.detach(), VALUE[torch.float32])

    generator = torch.Generator().manual_seed(len(flat))
    grad_maps, grad_moved = ([torch.randn(m.shape, generator=generator) for m in side] for side in (maps, moved))
    inputs = [*wide, *wide_tangents]
    outputs, cotangents = [*expected_maps, *expected_moved], [*grad_maps, *grad_moved]
    gradients = torch.autograd.grad(outputs, inputs, [cotangent.double() for cotangent in cotangents])
    # Gradients of order one, layer by layer, as loss scaling makes them: float16 has no room for less.
    floors = []
    for layer in range(len(features)):
        largest = max(g.abs().max().item() for g in gradients[layer :: len(features)])
        scale = 1 / largest if largest > ROUNDING else 1.0
        # A gradient that cancels to zero (a map of one position) keeps the rounding of what was cancelled.
        floors.append(HALF_SPACING if largest > ROUNDING else VALUE[torch.float32])
        for grads in (grad_maps, grad_moved):
            if grads:
                grads[layer] *= scale
        for g in gradients[layer :: len(features)]:
            g *= scale
    results = on_cuda("attention_maps_backward", grad_maps, grad_moved, features, tangents, power, flat)
    found = [*results[0], *results[1]]
    for index, (mine, truth, given) in enumerate(zip(found, gradients, [*features, *tangents], strict=True)):
        assert mine.dtype == given.dtype
        assert mine.stride() == torch.empty_like(given).stride()
        assert mine.stride() == torch.empty_like(given).stride()
        assert_close(mine, truth, GRADIENT[given.dtype], floors[index % len(features)])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(case):
    check(build(case)[0], tangents_of(case), case.power)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_half_precision(case, dtype):
    check(build(case, dtype)[0], tangents_of(case, dtype), case.power)


@pytest.mark.parametrize("name", ["conv", "odd", "channels_last", "zeros", "magnitude_1e-6", "power_3"])
def test_without_tangents(name):
    case = BY_NAME[name]
    check(build(case)[0], [], case.power)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_resized(memory):
    case = Case("to_sizes", ((2, 6, 8, 8), (1, 4, 5, 7), (1, 4, 6), (1, 3, 2, 3, 2)), (), memory=memory)
    sizes = [(4, 4), (7, 3), (6,), (1, 2, 5)]
    check(build(case)[0], tangents_of(case), sizes=sizes)
    check(build(case)[0], [], sizes=sizes)


def test_power_that_is_not_whole():
    case = BY_NAME["relu"]
    check(build(case)[0], tangents_of(case), power=2.5)


def test_tangents_in_another_memory_order():
    case = BY_NAME["conv"]
    check(build(case)[0], tangents_of(replace(case, memory="channels_last")))


@pytest.mark.parametrize("side", [28, 64, 70])
def test_maps_of_every_block(side):
    """Up to 1,024 and 4,096 positions in registers, and beyond that in a loop."""
    case = Case(f"side {side}", ((1, 2, side, side),), ())
    check(build(case)[0], tangents_of(case))


def test_bitwise_repeatable():
    features, tangents = build(BY_NAME["odd"])[0], tangents_of(BY_NAME["odd"])
    sizes = [n for f in features for n in f.shape[2:]]
    runs = []
    for _ in range(2):
        maps, moved = on_cuda("attention_maps", features, tangents, 2.0, sizes)
        gradients, tangent_gradients = on_cuda("attention_maps_backward", moved, maps, features, tangents, 2.0, sizes)
        runs.append([*maps, *moved, *gradients, *tangent_gradients])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_errors_name_the_layer():
    features, tangents = build(BY_NAME["conv"])[0], tangents_of(BY_NAME["conv"], torch.float64)
    with pytest.raises(TypeError, match=r"layer 0: tangent: found float64; the GPU kernels read float32"):
        on_cuda("attention_maps", features, tangents, 2.0, [6, 6, 3, 3])
    with pytest.raises(ValueError, match=r"expected 4 sizes, one for every spatial dimension.* found 3"):
        on_cuda("attention_maps", features, [], 2.0, [6, 6, 3])
