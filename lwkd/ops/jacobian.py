"""The four sums of a pair of derivatives and the distance formed from them, each one call over all layers.

Legend: ``L`` layers; ``a`` and ``b`` are the derivatives of student and teacher, of equal shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lwkd import reference
from lwkd.nets.transforms import transformed
from lwkd.ops.checks import check_inputs
from lwkd.ops.gradients import DifferentiableOp, Gradients, accumulation, gradients_through
from lwkd.reference import JacobianKind

Wanted = Sequence[list[bool]]
"""Of student and teacher, which of their derivatives need a gradient."""


@torch.library.register_fake("lwkd::jacobian_sums")
def _jacobian_sums_fake(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return a[0].new_empty((len(a), 4), dtype=accumulation(*a, *b))


@torch.library.register_fake("lwkd::jacobian_sums_backward")
def _jacobian_sums_backward_fake(
    grad: Tensor, a: list[Tensor], b: list[Tensor], of_b: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.empty_like(one) for one in a], [torch.empty_like(other) for other in b if of_b]


@torch.library.register_fake("lwkd::jacobian_divergence")
def _jacobian_divergence_fake(student: list[Tensor], teacher: list[Tensor], kind: str) -> tuple[Tensor, Tensor]:
    divergence = student[0].new_empty((len(student),), dtype=accumulation(*student, *teacher))
    return divergence, student[0].new_empty((len(student), 4), dtype=torch.float64)


@torch.library.register_fake("lwkd::jacobian_slopes")
def _jacobian_slopes_fake(sums: Tensor, grad: Tensor, kind: str) -> Tensor:
    return sums.new_empty(sums.shape, dtype=torch.float64)


def _fused(
    wanted: Wanted, grad_sums: Tensor, student: list[Tensor], teacher: list[Tensor]
) -> tuple[Gradients, Gradients]:
    """Gradients of the derivatives that need one, from the gradient ``(L, 4)`` of the sums."""
    wanted_S, wanted_T = wanted[:2]
    of_student, of_teacher = torch.ops.lwkd.jacobian_sums_backward(grad_sums, student, teacher, any(wanted_T))
    return (
        [g if needed else None for g, needed in zip(of_student, wanted_S, strict=True)],
        [g if needed else None for g, needed in zip(of_teacher or [None] * len(teacher), wanted_T, strict=True)],
    )


def _jacobian_sums_setup(ctx: Any, inputs: tuple[list[Tensor], list[Tensor]], output: Tensor) -> None:
    a, b = inputs
    ctx.layers = len(a)
    ctx.save_for_backward(*a, *b)


def _jacobian_sums_backward(ctx: Any, wanted: Wanted, grad: Tensor) -> tuple[Gradients, Gradients]:
    a, b = list(ctx.saved_tensors[: ctx.layers]), list(ctx.saved_tensors[ctx.layers :])
    if torch.is_grad_enabled():
        found = gradients_through([reference.jacobian_sums(a, b)], [*a, *b], [grad])
        return found[: ctx.layers], found[ctx.layers :]
    return _fused(wanted, grad, a, b)


_jacobian_sums = DifferentiableOp("jacobian_sums", _jacobian_sums_setup, _jacobian_sums_backward)


def _jacobian_divergence_setup(
    ctx: Any, inputs: tuple[list[Tensor], list[Tensor], str], output: tuple[Tensor, Tensor]
) -> None:
    student, teacher, ctx.kind = inputs
    ctx.layers = len(student)
    ctx.save_for_backward(*student, *teacher, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _jacobian_divergence_backward(
    ctx: Any, wanted: Wanted, grad: Tensor | None, _: None
) -> tuple[Gradients, Gradients, None]:
    *derivatives, sums = ctx.saved_tensors
    student, teacher = derivatives[: ctx.layers], derivatives[ctx.layers :]
    if grad is None:  # a function behind it has none, which is a zero
        return [None] * ctx.layers, [None] * ctx.layers, None
    if torch.is_grad_enabled():
        outputs = [reference.jacobian_divergence(student, teacher, kind=ctx.kind)]
        found = gradients_through(outputs, derivatives, [grad])
        return found[: ctx.layers], found[ctx.layers :], None
    slopes = torch.ops.lwkd.jacobian_slopes if sums.device.type == "cpu" else _slopes
    return *_fused(wanted, slopes(sums, grad, ctx.kind), student, teacher), None


def _slopes(sums: Tensor, grad: Tensor, kind: JacobianKind) -> Tensor:
    """Gradient ``(L, 4)`` of the sums from that ``(L,)`` of the distance; autograd through the reference takes longer.

    For a GPU. 0 where the distance is decided by a zero, or at its clamp; NaN where a sum is not finite. As
    ``jacobian_slopes`` in ``csrc/distances.h``, which the CPU uses.
    """
    aa, bb, ab, dd = sums.unbind(-1)
    zero = torch.zeros_like(aa)
    counts = torch.isfinite(sums).all(-1) & (aa != 0) & (bb != 0)
    if kind == "relative":
        total = aa + bb
        counts = torch.isfinite(sums).all(-1) & (total != 0)
        of_aa = -dd / total.square()
        found = torch.stack([of_aa, of_aa, zero, 1 / total], -1)
    elif kind == "norm":
        norm_a, norm_b = aa.sqrt(), bb.sqrt()
        scale = (norm_a - norm_b).sign() / (norm_a + norm_b).square()
        found = torch.stack([scale * norm_b / norm_a, -scale * norm_a / norm_b, zero, zero], -1)
    else:
        norm_a, norm_b = aa.sqrt(), bb.sqrt()
        product, alike = norm_a * norm_b, (norm_a <= 2 * norm_b) & (norm_b <= 2 * norm_a)
        apart, cosine, lean = dd / product, ab / product, (aa - bb) / product
        angle = torch.where(alike, apart - (norm_a - norm_b).square() / product, 2 - 2 * cosine)
        counts &= (angle >= 0) & (angle <= 4)
        of_aa = torch.where(alike, (-apart - lean) / 2, cosine) / aa
        of_bb = torch.where(alike, (-apart + lean) / 2, cosine) / bb
        of_ab = torch.where(alike, zero, -2 / product)
        found = torch.stack([of_aa, of_bb, of_ab, torch.where(alike, 1 / product, zero)], -1)
    found = torch.where(counts.unsqueeze(1), found, 0.0)
    found = torch.where(torch.isfinite(sums).all(-1, keepdim=True), found, torch.nan)
    return found * grad.to(sums.dtype).unsqueeze(1)


_jacobian_divergence = DifferentiableOp(
    "jacobian_divergence", _jacobian_divergence_setup, _jacobian_divergence_backward
)


def jacobian_sums(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    r"""Four sums over each pair of derivatives, from which every distance between them follows.

    .. math:: aa = \sum a^2,\quad bb = \sum b^2,\quad ab = \sum a\,b,\quad dd = \sum (a-b)^2

    ``dd`` is redundant on paper (``aa + bb − 2ab``) and keeps small distances exact in floating point.

    Each pair is read once. Differentiable once with respect to both sides by a fused backward that reads the pair once
    and writes both gradients, in the dtype and memory format of each side; a second derivative
    (``create_graph=True``), and a transform of ``torch.func``, go through :func:`lwkd.reference.jacobian_sums`.

    Args:
        a: L derivatives of the student, of any shape (empty ones have sums 0); float32, float16, bfloat16 or float64.
        b: L derivatives of the teacher, each of the shape of its partner. Dense pairs of one dtype and equal strides
            are read where they are; else one side is copied into the other's layout, or into the wider dtype.

    Returns:
        ``(L, 4)``: aa, bb, ab, dd; accumulated in float64 (half precision in float32 over 128 elements at a time, whose
        products are exact there); float32, float64 if an input is. NaN and infinity stay in their layer. The same bits
        on every run and for any number of threads.

    Raises:
        ValueError: for no layers, lists of different lengths, or a pair of different shapes.
        TypeError: for a dtype that is not one of the above; for float64 on CUDA.
        NotImplementedError: for tensors that are neither on the CPU nor on CUDA.
        RuntimeError: for an input that carries a forward-mode tangent.

    Source: Srinivas & Fleuret 2018 (matching Jacobians), reduced to sums that can be averaged over probes.

    >>> jacobian_sums([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 0.0])])
    tensor([[5., 1., 1., 4.]])
    """
    a, b = list(a), list(b)
    _check_pairs("jacobian_sums", a, b)
    if transformed():
        return reference.jacobian_sums(a, b)
    sums: Tensor = _jacobian_sums(a, b)
    return sums


def jacobian_divergence(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, kind: JacobianKind = "direction"
) -> Tensor:
    r"""Distance between the derivatives of student and teacher, one number a layer.

    .. math:: \mathrm{direction} = 2 - \frac{2\,ab}{\sqrt{aa\,bb}},\quad
        \mathrm{norm} = \frac{|\sqrt{aa}-\sqrt{bb}|}{\sqrt{aa}+\sqrt{bb}},\quad
        \mathrm{relative} = \frac{dd}{aa+bb}

    with the sums of :func:`jacobian_sums`. Where the norms are within a factor of two, the direction is formed as
    ``(dd − (√aa − √bb)²) / √(aa·bb)``, the same number without the cancellation. Two zero derivatives have distance 0;
    where one of them is zero, the direction is 4, norm and relative are 1.

    Each pair is read once, forward and backward. Differentiable once with respect to both sides; a second derivative
    (``create_graph=True``), and a transform of ``torch.func``, go through :func:`lwkd.reference.jacobian_divergence`.

    Args:
        student: L derivatives of any shape; float32, float16, bfloat16 or float64.
        teacher: L derivatives, each of the shape of its partner; read as in :func:`jacobian_sums`.
        kind: which distance; direction in [0, 4], norm in [0, 1], relative in [0, 2].

    Returns:
        ``(L,)`` float32, float64 if an input is; formed in float64 from sums that are not rounded in between. NaN
        where the sums are NaN or infinite. The same bits on every run and for any number of threads.

    Raises:
        ValueError: for no layers, lists of different lengths, a pair of different shapes, or an unknown kind.
        TypeError: for a dtype that is not one of the above; for float64 on CUDA.
        NotImplementedError: for tensors that are neither on the CPU nor on CUDA.
        RuntimeError: for an input that carries a forward-mode tangent.

    Source: Srinivas & Fleuret 2018 (direction); definitions in :func:`lwkd.reference.jacobian_distance`.

    >>> jacobian_divergence([torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 2.0])])
    tensor([2.])
    """
    student, teacher = list(student), list(teacher)
    _check_pairs("jacobian_divergence", student, teacher)
    if transformed():
        return reference.jacobian_divergence(student, teacher, kind=kind)
    divergence: Tensor = _jacobian_divergence(student, teacher, kind)[0]
    return divergence


def _check_pairs(op: str, student: list[Tensor], teacher: list[Tensor]) -> None:
    check_inputs(op, [*student, *teacher])
    if len(student) != len(teacher):
        raise ValueError(
            f"lwkd.ops.{op}: expected as many teacher derivatives as student derivatives, found {len(student)} of the "
            f"student and {len(teacher)} of the teacher. Pass one of each for every layer."
        )
