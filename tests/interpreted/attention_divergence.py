"""Attention divergence kernels, forward and backward, against the reference in float64."""

import pytest
import torch
from cases import CASES, CONV, Case, build, probabilities
from standin import on_cuda
from tolerances import GRADIENT, ROUNDING, SMALL_DIVERGENCE, TRUNCATING_CAST, VALUE, assert_close

from lwkd import reference

GRADIENT = GRADIENT | {torch.bfloat16: TRUNCATING_CAST}
SMALL = [case for case in CASES if len(case.student) < 10]
BY_NAME = {case.name: case for case in CASES}


def check(student, teacher, source="features", power=2.0, kind="jsd", betas=(0.5, 0.5)):
    wide = [feature.double().requires_grad_() for feature in student]
    expected = reference.attention_divergence(
        wide, [f.double() for f in teacher], source=source, power=power, kind=kind, betas=betas
    )
    found, factors = on_cuda("attention_divergence", student, teacher, source, power, kind, betas, True)
    assert found.dtype == torch.float32
    for value, truth, feature in zip(found, expected, student, strict=True):
        assert_close(value, truth.detach(), VALUE[feature.dtype])

    gradients = torch.autograd.grad(expected.sum(), wide)
    # Gradients of order one, as loss scaling makes them: float16 has no room for less.
    largest = torch.stack([gradient.abs().max() for gradient in gradients]).float()
    scale = torch.where(largest > ROUNDING, 1 / largest, 1.0)
    results = on_cuda("attention_divergence_backward", scale, student, factors, source, power)
    for result, gradient, feature, s in zip(results, gradients, student, scale, strict=True):
        assert result.dtype == feature.dtype
        assert result.stride() == torch.empty_like(feature).stride()
        assert result.stride() == torch.empty_like(feature).stride()
        assert_close(result, gradient * s, GRADIENT[feature.dtype])


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_float32(case):
    check(*build(case), power=case.power, betas=case.betas)


# The distance sees maps, not features: memory orders are covered above.
@pytest.mark.parametrize("case", [case for case in SMALL if case.memory == "contiguous"], ids=str)
def test_l2(case):
    check(*build(case), power=case.power, kind="l2")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_half_precision(case, dtype):
    check(*build(case, dtype), power=case.power, betas=case.betas)


def test_power_that_is_not_whole():
    check(*build(BY_NAME["relu"]), power=2.5)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_cut_in_chunks(memory, dtype):
    case = Case("deep", ((1, 256, 6, 6), (2, 96, 3, 3)), ((1, 300, 6, 6), (2, 130, 3, 3)), memory=memory)
    check(*build(case, dtype))


def test_layers_of_different_dtype_and_memory_order():
    student = [
        build(Case(f"mixed{index}", ((2, 8, 5, 4),), (), memory=memory), dtype)[0][0]
        for index, (memory, dtype) in enumerate(
            [("contiguous", torch.float32), ("channels_last", torch.bfloat16), ("offset", torch.float16)]
        )
    ]
    teacher = [student[1], student[2], student[0]]
    check(student, teacher)


def test_tokens_without_class_token_are_read_in_place():
    sequence = torch.randn(2, 11, 8, generator=torch.Generator().manual_seed(0))
    student = sequence[:, 1:].transpose(1, 2)
    assert not student.is_contiguous()
    check([student], [student.flip(2).contiguous()])


@pytest.mark.parametrize("kind", ["jsd", "l2"])
@pytest.mark.parametrize("side", [28, 64, 70])
def test_maps_of_every_block(side, kind):
    """Up to 1,024 and 4,096 positions in registers, and beyond that in a loop."""
    check(*build(Case(f"side {side}", ((1, 2, side, side),), ((1, 3, side, side),))), kind=kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [5, 8])
def test_probabilities(tokens, dtype):
    student, teacher = probabilities(2, (2, 3), tokens, dtype)
    check([student, student], [teacher, teacher.flip(0)], source="probabilities")


def test_probabilities_with_an_empty_row():
    student, teacher = probabilities(1, (2, 3), 4, torch.float32)
    student[:, :, 1] = 0
    teacher[:, :, 2] = 0
    check([student], [teacher], source="probabilities", kind="l2")
    check([student], [teacher], source="probabilities")


def test_512_layers():
    generator = torch.Generator().manual_seed(0)
    student = [torch.randn(1, 2, 2, 1, generator=generator) for _ in range(512)]
    teacher = [torch.randn(1, 3, 2, 1, generator=generator) for _ in range(512)]
    check(student, teacher)


@pytest.mark.parametrize("size", [1e-2, 1e-4])
def test_small_divergences(size):
    generator = torch.Generator().manual_seed(0)
    student = torch.rand(2, 8, 14, 14, generator=generator) + 0.5
    teacher = student * (1 + size * torch.randn(2, 1, 14, 14, generator=generator))
    expected = reference.attention_divergence([student.double()], [teacher.double()])
    found, _ = on_cuda("attention_divergence", [student], [teacher], "features", 2.0, "jsd", (0.5, 0.5), False)
    assert expected.item() < 2 * size**2
    assert abs(found.item() / expected.item() - 1) < SMALL_DIVERGENCE


def test_identical_and_disjoint_maps():
    one, other = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    one[..., :2], other[..., 2:] = 1, 1
    found, _ = on_cuda("attention_divergence", [one, one], [one, other], "features", 2.0, "jsd", (0.5, 0.5), False)
    assert found[0] == 0
    assert_close(found[1], torch.tensor(reference.LARGEST_JSD), VALUE[torch.float32])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_features_spoil_only_their_own_layer(bad):
    student, teacher = build(Case("bad", *CONV))
    student[0][0, 0, 0, 0] = bad
    found, _ = on_cuda("attention_divergence", student, teacher, "features", 2.0, "jsd", (0.5, 0.5), True)
    assert torch.isnan(found[0])
    assert torch.isfinite(found[1])


@pytest.mark.parametrize("name", ["conv", "channels_last_odd", "resized"])
def test_bitwise_repeatable(name):
    student, teacher = build(BY_NAME[name])
    runs = []
    for _ in range(2):
        divergences, factors = on_cuda(
            "attention_divergence", student, teacher, "features", 2.0, "jsd", (0.5, 0.5), True
        )
        gradients = on_cuda("attention_divergence_backward", divergences, student, factors, "features", 2.0)
        runs.append([divergences, *factors, *gradients])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_double_precision_is_refused_by_name():
    student, teacher = build(BY_NAME["conv"], torch.float64)
    with pytest.raises(TypeError, match=r"layer 0: student: found float64; the GPU kernels read float32, float16"):
        on_cuda("attention_divergence", student, teacher, "features", 2.0, "jsd", (0.5, 0.5), False)
