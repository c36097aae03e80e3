"""The four sums of a pair of derivatives and the distance formed from them; backward in :mod:`lwkd.registration`.

Legend: ``L`` layers; ``a`` and ``b`` are the derivatives of student and teacher, of one shape, whatever that is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lwkd.ops.checks import check_inputs
from lwkd.reference import JacobianKind


def jacobian_sums(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    r"""Four sums over each pair of derivatives, from which every distance between them follows.

    .. math:: aa = \sum a^2,\quad bb = \sum b^2,\quad ab = \sum a\,b,\quad dd = \sum (a-b)^2

    ``dd`` is redundant on paper (``aa + bb − 2ab``) and keeps small distances exact in floating point.

    Each pair is read once. Differentiable once with respect to both sides by a fused backward that reads the pair once
    and writes both gradients, in the dtype and memory format of each side; a second derivative
    (``create_graph=True``) goes through :func:`lwkd.reference.jacobian_sums`.

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
    return torch.ops.lwkd.jacobian_sums(a, b)


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
    (``create_graph=True``) goes through :func:`lwkd.reference.jacobian_divergence`.

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
    divergence, _ = torch.ops.lwkd.jacobian_divergence(student, teacher, kind)
    return divergence


def _check_pairs(op: str, student: list[Tensor], teacher: list[Tensor]) -> None:
    check_inputs(op, [*student, *teacher])
    if len(student) != len(teacher):
        raise ValueError(
            f"lwkd.ops.{op}: expected as many teacher derivatives as student derivatives, found {len(student)} of the "
            f"student and {len(teacher)} of the teacher. Pass one of each for every layer."
        )
