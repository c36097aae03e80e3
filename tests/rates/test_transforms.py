"""Loops whose passes run inside of transforms of ``torch.func``: measured, and what a plain loop measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from toy import nets

import lwkd

Gradients = dict[str, Tensor]


def gap(given: Tensor, target: Tensor) -> Tensor:
    return (given - target).square().mean()


def plain(student: nn.Module, teacher: nn.Module, x: Tensor) -> Gradients:
    with torch.no_grad():
        target = teacher(x)
    named = dict(student.named_parameters())
    return dict(zip(named, torch.autograd.grad(gap(student(x), target), list(named.values())), strict=True))


def inside_of_grad(student: nn.Module, teacher: nn.Module, x: Tensor) -> Gradients:
    def loss(parameters: Gradients) -> Tensor:
        with torch.no_grad():
            target = teacher(x)
        return gap(functional_call(student, parameters, (x,)), target)

    return grad(loss)(dict(student.named_parameters()))


def a_gradient_for_each_row(student: nn.Module, teacher: nn.Module, x: Tensor, teach_row: bool = True) -> Gradients:
    with torch.no_grad():
        targets = x.new_zeros(len(x)) if teach_row else teacher(x)

    def loss(parameters: Gradients, row: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(row[None]) if teach_row else target[None]
        return gap(functional_call(student, parameters, (row[None],)), target)

    found = vmap(grad(loss), in_dims=(None, 0, 0))(dict(student.named_parameters()), x, targets)
    return {name: gradients.mean(0) for name, gradients in found.items()}


def teacher_with_the_batch(student: nn.Module, teacher: nn.Module, x: Tensor) -> Gradients:
    return a_gradient_for_each_row(student, teacher, x, teach_row=False)


def vmap_inside_of_grad(student: nn.Module, teacher: nn.Module, x: Tensor) -> Gradients:
    def loss(parameters: Gradients) -> Tensor:
        with torch.no_grad():
            target = teacher(x)
        rows = vmap(lambda row: functional_call(student, parameters, (row[None],))[0], in_dims=3, out_dims=0)
        return gap(rows(x.movedim(0, 3)), target)

    return grad(loss)(dict(student.named_parameters()))


def measured(gradients_of: Callable[..., Gradients], signal: str) -> tuple[list[dict[str, float]], dict[str, Any]]:
    student, teacher, pairing = nets()
    base = torch.optim.SGD(student.parameters(), lr=0.1)
    optimizer = lwkd.LayerwiseOptimizer(
        base, student.eval(), teacher.eval(), pairing, signal=signal, policy=lwkd.Relative(), every=1
    )
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(3):
        gradients = gradients_of(student, teacher, torch.rand(4, 1, 8, 8, generator=generator))
        for name, parameter in student.named_parameters():
            parameter.grad = gradients[name].detach()
        optimizer.step()
        found.append(dict(optimizer.divergences))
    return found, dict(optimizer.passes)


@pytest.mark.parametrize("signal", ["attention", "jacobian", "hessian"])
@pytest.mark.parametrize(
    "gradients_of", [inside_of_grad, a_gradient_for_each_row, teacher_with_the_batch, vmap_inside_of_grad]
)
def test_what_a_plain_loop_measures(gradients_of: Callable[..., Gradients], signal: str) -> None:
    expected, _ = measured(plain, signal)
    found, passes = measured(gradients_of, signal)
    assert passes == {"measured": 3}
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_one_vmap_inside_of_another_is_an_error_that_says_what_to_do() -> None:
    student, teacher, pairing = nets()
    lwkd.LayerwiseOptimizer(torch.optim.SGD(student.parameters(), lr=0.1), student.eval(), teacher, pairing)
    with pytest.raises(NotImplementedError, match=r"inside of two vmaps.*Call it with a batch"):
        vmap(vmap(lambda row: student(row[None])))(torch.rand(2, 3, 1, 8, 8))
