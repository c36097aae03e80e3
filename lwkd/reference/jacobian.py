r"""The specification of the Jacobian's four sums and of the distances that are formed from them, in plain PyTorch.

Legend: ``L`` layers; ``a`` and ``b`` are the derivatives of student and teacher, of equal shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lwkd.reference.attention import widen

JacobianKind = Literal["direction", "norm", "relative"]


def jacobian_sums(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    r"""In plain PyTorch what :func:`lwkd.ops.jacobian_sums` does: four sums over each pair of derivatives.

    .. math:: aa = \sum a^2,\quad bb = \sum b^2,\quad ab = \sum a\,b,\quad dd = \sum (a-b)^2
    """
    rows = []
    for one, other in zip(a, b, strict=True):
        x, y = widen(one), widen(other)
        rows.append(torch.stack([(x * x).sum(), (y * y).sum(), (x * y).sum(), (x - y).square().sum()]))
    dtype = torch.float64 if any(row.dtype == torch.float64 for row in rows) else torch.float32
    return torch.stack([row.to(dtype) for row in rows])


def jacobian_distance(sums: Tensor, kind: JacobianKind = "direction") -> Tensor:
    r"""Distance between two derivatives, from their four sums.

    .. math:: \mathrm{direction} = 2 - \frac{2\,ab}{\sqrt{aa\,bb}},\quad
        \mathrm{norm} = \frac{|\sqrt{aa}-\sqrt{bb}|}{\sqrt{aa}+\sqrt{bb}},\quad
        \mathrm{relative} = \frac{dd}{aa+bb}

    Where the norms are within a factor of two, the direction is formed as
    ``(dd − (√aa − √bb)²) / √(aa·bb)``, the same number without the cancellation. Two zero derivatives have distance
    0; where one of them is zero, the direction is 4 (opposite, its largest value), norm and relative are 1. Sums that
    are NaN or infinite give NaN.

    Args:
        sums: ``(L, 4)`` as of :func:`jacobian_sums`, or their mean over probes and measurements.
        kind: which distance; direction in [0, 4], norm in [0, 1], relative in [0, 2].

    Returns:
        ``(L,)``, in the dtype of the sums; computed in float64.

    >>> jacobian_distance(torch.tensor([[1.0, 1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]]))
    tensor([2., 0.])
    """
    aa, bb, ab, dd = sums.double().unbind(-1)
    zero, one = torch.zeros_like(aa), torch.ones_like(aa)
    none, both = (aa == 0) & (bb == 0), (aa != 0) & (bb != 0)
    # Where a zero decides the result, roots and quotients get 1 instead, so that gradients stay finite there as well.
    safe_aa, safe_bb = torch.where(both, aa, one), torch.where(both, bb, one)
    norm_a, norm_b = safe_aa.sqrt(), safe_bb.sqrt()
    if kind == "relative":
        found = torch.where(none, zero, dd / torch.where(none, one, aa + bb))
    elif kind == "norm":
        found = torch.where(both, (norm_a - norm_b).abs() / (norm_a + norm_b), torch.where(none, zero, one))
    elif kind == "direction":
        alike = (norm_a <= 2 * norm_b) & (norm_b <= 2 * norm_a)
        angle = torch.where(
            alike, (dd - (norm_a - norm_b).square()) / (norm_a * norm_b), 2 - 2 * ab / (norm_a * norm_b)
        )
        found = torch.where(both, angle.clamp(0, 4), torch.where(none, zero, 4 * one))
    else:
        raise ValueError(f"kind {kind!r} is not known; expected 'direction', 'norm' or 'relative'")
    finite = torch.isfinite(sums).all(-1)
    return torch.where(finite, found, torch.full_like(found, float("nan"))).to(sums.dtype)


def jacobian_divergence(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, kind: JacobianKind = "direction"
) -> Tensor:
    """In plain PyTorch what :func:`lwkd.ops.jacobian_divergence` does: the distance from the sums of each pair."""
    return jacobian_distance(jacobian_sums(student, teacher), kind)
