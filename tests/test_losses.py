"""Distillation losses against their formulas in float64, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from tolerances import VALUE, assert_close

import lwkd


def _logits(rows: int = 5, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(classes, (rows,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_distillation_is_its_formula(dtype: torch.dtype) -> None:
    student, teacher, targets = _logits()
    t, a = 3.0, 0.7
    p, q = (teacher / t).softmax(1), (student / t).softmax(1)
    soft = t * t * (p * (p / q).log()).sum(1).mean()
    hard = -student.log_softmax(1)[range(5), targets].mean()
    found = lwkd.losses.distillation(student.to(dtype), teacher.to(dtype), targets, temperature=t, alpha=a)
    assert_close(found, a * soft + (1 - a) * hard, VALUE[dtype])
    assert_close(lwkd.losses.distillation(student.to(dtype), teacher.to(dtype), temperature=t), soft, VALUE[dtype])


def test_distillation_in_half_precision_is_computed_in_float32() -> None:
    student, teacher, targets = (t.bfloat16() if t.is_floating_point() else t for t in _logits())
    found = lwkd.losses.distillation(student, teacher, targets)
    assert found.dtype == torch.float32
    assert_close(found, lwkd.losses.distillation(student.double(), teacher.double(), targets), VALUE[torch.float32])


def test_gradients_reach_the_student_only() -> None:
    student, teacher, targets = _logits()
    student.requires_grad_()
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: lwkd.losses.distillation(s, teacher.detach(), targets), student)
    lwkd.losses.distillation(student, teacher, targets).backward()
    assert teacher.grad is None


def test_attention_transfer_is_the_mean_distance_of_unit_maps() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 4, 4), (2, 5, 2, 2))
    student = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    teacher = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]

    def unit(f: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(f.square().sum(1).flatten(1))

    expected = sum((unit(s) - unit(t)).square().sum(1).mean() for s, t in zip(student, teacher, strict=True)) / 2
    assert_close(lwkd.losses.attention_transfer(student, teacher), expected, VALUE[torch.float64])
    assert torch.autograd.gradcheck(lambda *s: lwkd.losses.attention_transfer(s, teacher), student)
    lwkd.losses.attention_transfer(student, teacher).backward()
    assert all(t.grad is None for t in teacher)


def test_what_the_losses_refuse() -> None:
    student, teacher, targets = _logits()
    with pytest.raises(ValueError, match=r"student logits have shape \(5, 7\), teacher logits \(5, 6\)"):
        lwkd.losses.distillation(student, teacher[:, :6], targets)
    with pytest.raises(ValueError, match="temperature is 0; expected a positive number"):
        lwkd.losses.distillation(student, teacher, targets, temperature=0)
    with pytest.raises(ValueError, match="alpha is 2; expected a number in"):
        lwkd.losses.distillation(student, teacher, targets, alpha=2)
    with pytest.raises(ValueError, match="kind is 'kl'; expected 'jsd' or 'l2'"):
        lwkd.losses.attention_transfer([student], [teacher], kind="kl")  # type: ignore[arg-type]
