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


def _masked(logits: torch.Tensor, classes: list[int]) -> torch.Tensor:
    """Room for these classes, whose logits are −inf in all rows."""
    wide = torch.full((len(logits), logits.shape[1] + len(classes)), float("-inf"), dtype=logits.dtype)
    wide[:, [k for k in range(wide.shape[1]) if k not in classes]] = 0.0
    found = torch.empty_like(wide)
    found[:, [k for k in range(wide.shape[1]) if k not in classes]] = logits
    return torch.where(wide == 0, found, wide)


def test_classes_masked_in_both_nets_are_as_none() -> None:
    student, teacher, targets = _logits()
    gone = [0, 4, 8]
    place = torch.tensor([k for k in range(10) if k not in gone])
    plain, wide = student.clone().requires_grad_(), student.clone().requires_grad_()
    for given in (None, targets):
        moved = None if given is None else place[given]
        expected = lwkd.losses.distillation(plain, teacher, given)
        found = lwkd.losses.distillation(_masked(wide, gone), _masked(teacher, gone), moved)
        assert_close(found, expected, VALUE[torch.float64])
        gradients = torch.autograd.grad(found, wide)[0], torch.autograd.grad(expected, plain)[0]
        assert_close(*gradients, VALUE[torch.float64])
    half = lwkd.losses.distillation(_masked(student.bfloat16(), gone), _masked(teacher.bfloat16(), gone))
    assert half.isfinite()


def test_classes_masked_in_one_net_only() -> None:
    """By the formula: 0 · log(0 / q) is 0, and p · log(p / 0) is infinite."""
    student, teacher, _ = _logits()
    student.requires_grad_()
    teacher[:, 2] = float("-inf")
    teacher[1, 5] = -1e5  # underflows to exactly 0
    p, q = (teacher / 4).softmax(1), (student / 4).softmax(1)
    terms = torch.where(p > 0, p * (p.clamp(min=1e-300) / q).log(), torch.zeros(()).double())
    found = lwkd.losses.distillation(student, teacher)
    assert_close(found, 16 * terms.sum(1).mean(), VALUE[torch.float64])
    assert torch.autograd.gradcheck(lambda z: lwkd.losses.distillation(z, teacher), student)
    masked = torch.cat([student[:, :1], torch.full((5, 1), float("-inf")).double(), student[:, 2:]], 1)
    assert lwkd.losses.distillation(masked, teacher).isposinf()
    gradient = torch.autograd.grad(lwkd.losses.distillation(masked, teacher), student)[0]
    assert gradient.isfinite().all(), "a step may be taken nevertheless"


def _labels(rows: int = 5, classes: int = 7) -> torch.Tensor:
    return torch.randint(2, (rows, classes), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_multilabel_distillation_is_its_formula(dtype: torch.dtype) -> None:
    student, teacher, _ = _logits()
    targets, t, a = _labels(), 3.0, 0.7
    q, p, sure = (1 / (1 + (-z).exp()) for z in (student / t, teacher / t, student))
    soft = t * t * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean()
    hard = -torch.where(targets == 1, sure, 1 - sure).log().sum(1).mean()
    loss, given = lwkd.losses.multilabel_distillation, (student.to(dtype), teacher.to(dtype))
    for kind in (torch.uint8, torch.float32):
        assert_close(loss(*given, targets.to(kind), temperature=t, alpha=a), a * soft + (1 - a) * hard, VALUE[dtype])
    assert_close(loss(*given, temperature=t), soft, VALUE[dtype])


def test_multilabel_distillation_trains_the_student_only_and_is_stable() -> None:
    student, teacher, _ = _logits()
    targets = _labels()
    student.requires_grad_()
    teacher.requires_grad_()
    loss = lwkd.losses.multilabel_distillation
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher.detach(), targets), student)
    loss(student, teacher, targets).backward()
    assert teacher.grad is None
    # p is 1 and q is sigmoid(-2500), then p is 0 and q is 1 - sigmoid(-2500): both cost 2500 nats.
    far = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    for sure in (torch.tensor([[1e4, -1e4]]), torch.tensor([[float("inf"), float("-inf")]])):
        found = loss(far, sure)
        assert_close(found, torch.tensor(16 * 5000.0), VALUE[torch.float32])
        # d/dz of T² · KL is T · (q - p).
        assert_close(torch.autograd.grad(found, far)[0], torch.tensor([[-4.0, 4.0]]), VALUE[torch.float32])
    same = torch.tensor([[1e4, -1e4, 0.0]])
    assert loss(same, same, torch.tensor([[1, 0, 0]]), alpha=1.0) == 0


def test_multilabel_distillation_refuses_class_indices() -> None:
    student, teacher, targets = _logits()
    with pytest.raises(ValueError, match=r"targets have shape \(5,\), logits \(5, 7\); .*class indices go with"):
        lwkd.losses.multilabel_distillation(student, teacher, targets)
    with pytest.raises(ValueError, match="temperature is -1; expected a positive number"):
        lwkd.losses.multilabel_distillation(student, teacher, temperature=-1)
