"""Fake kernels and autograd of the Jacobian ops. Legend: ``L`` layers; student before teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lwkd import reference
from lwkd.registration.gradients import accumulation, gradients_through

Gradients = list[Tensor | None]


@torch.library.register_fake("lwkd::jacobian_sums")
def _jacobian_sums_fake(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return a[0].new_empty((len(a), 4), dtype=accumulation(*a, *b))


@torch.library.register_fake("lwkd::jacobian_sums_backward")
def _jacobian_sums_backward_fake(grad: Tensor, a: list[Tensor], b: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.empty_like(one) for one in a], [torch.empty_like(other) for other in b]


@torch.library.register_fake("lwkd::jacobian_divergence")
def _jacobian_divergence_fake(student: list[Tensor], teacher: list[Tensor], kind: str) -> tuple[Tensor, Tensor]:
    divergence = student[0].new_empty((len(student),), dtype=accumulation(*student, *teacher))
    return divergence, student[0].new_empty((len(student), 4), dtype=torch.float64)


def _fused(ctx: Any, grad_sums: Tensor, student: list[Tensor], teacher: list[Tensor]) -> tuple[Gradients, Gradients]:
    of_student, of_teacher = torch.ops.lwkd.jacobian_sums_backward(grad_sums, student, teacher)
    wanted_S, wanted_T = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    return (
        [g if wanted else None for g, wanted in zip(of_student, wanted_S, strict=True)],
        [g if wanted else None for g, wanted in zip(of_teacher, wanted_T, strict=True)],
    )


def _jacobian_sums_setup(ctx: Any, inputs: tuple[list[Tensor], list[Tensor]], output: Tensor) -> None:
    a, b = inputs
    ctx.layers = len(a)
    ctx.save_for_backward(*a, *b)


def _jacobian_sums_backward(ctx: Any, grad: Tensor) -> tuple[Gradients, Gradients]:
    a, b = list(ctx.saved_tensors[: ctx.layers]), list(ctx.saved_tensors[ctx.layers :])
    if torch.is_grad_enabled():
        found = gradients_through([reference.jacobian_sums(a, b)], [*a, *b], [grad])
        return found[: ctx.layers], found[ctx.layers :]
    return _fused(ctx, grad, a, b)


torch.library.register_autograd("lwkd::jacobian_sums", _jacobian_sums_backward, setup_context=_jacobian_sums_setup)


def _jacobian_divergence_setup(
    ctx: Any, inputs: tuple[list[Tensor], list[Tensor], str], output: tuple[Tensor, Tensor]
) -> None:
    student, teacher, ctx.kind = inputs
    ctx.layers = len(student)
    ctx.save_for_backward(*student, *teacher, output[1])


def _jacobian_divergence_backward(ctx: Any, grad: Tensor, grad_sums: Tensor) -> tuple[Gradients, Gradients, None]:
    *derivatives, sums = ctx.saved_tensors
    student, teacher = derivatives[: ctx.layers], derivatives[ctx.layers :]
    if torch.is_grad_enabled():
        again = reference.jacobian_sums(student, teacher)
        outputs = [reference.jacobian_distance(again, ctx.kind), again]
        found = gradients_through(outputs, derivatives, [grad, grad_sums.to(again.dtype)])
        return found[: ctx.layers], found[ctx.layers :], None
    with torch.enable_grad():  # four numbers a layer
        leaf = sums.detach().requires_grad_()
        distance = reference.jacobian_distance(leaf, ctx.kind)
        (through,) = torch.autograd.grad(distance, leaf, grad.to(leaf.dtype))
    return *_fused(ctx, grad_sums + through, student, teacher), None


torch.library.register_autograd(
    "lwkd::jacobian_divergence", _jacobian_divergence_backward, setup_context=_jacobian_divergence_setup
)
