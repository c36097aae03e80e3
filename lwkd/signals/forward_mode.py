"""Forward mode with fewer passes over the data: rules of our own for linear layers and batch norms.

torch (2.11) pushes a tangent through a convolution or a linear layer in three calls: of the input, of the tangent, and
of the input with a weight's tangent of zeros that it fills first; and through a batch norm by a decomposition in
Python. Here input and tangent go through a linear layer together, as the rows of one batch, and the weights' tangent,
which nobody asked for, is left out. The numbers are the same but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from lwkd.signals.replacing import Replacing


def _tangent(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else forward_ad.unpack_dual(tensor).tangent


def _row_by_row(function: Callable[..., Tensor], dims: int | None) -> Callable[..., Tensor | None]:
    """The rule of a function that is linear in its first argument and does the same to each of its rows.

    Args:
        function: the function.
        dims: dimensions of an input that has rows; None is any number above one.
    """

    def rule(input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **more: Any) -> Tensor | None:
        if (input.dim() != dims if dims else input.dim() < 2) or not (_tangent(weight) is _tangent(bias) is None):
            return None
        primal, tangent = forward_ad.unpack_dual(input)
        if tangent is None:
            return None
        moved, change = function(torch.cat([primal, tangent]), weight, None, *rest, **more).chunk(2)
        if bias is not None:
            moved.add_(bias.view(-1, *[1] * (dims - 2)) if dims else bias)
        return forward_ad.make_dual(moved, change)

    return rule


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    one_value = training and input.numel() == input.shape[1]  # an error, which torch's own function raises
    if input.dim() < 2 or one_value or not (_tangent(weight) is _tangent(bias) is None):
        return None
    primal, tangent = forward_ad.unpack_dual(input)
    if tangent is None:
        return None
    shape = (-1, *[1] * (input.dim() - 2))
    if not training and running_mean is not None and running_var is not None:
        moved = F.batch_norm(primal, running_mean, running_var, weight, bias, False, momentum, eps)
        scale = (running_var + eps).rsqrt()
        return forward_ad.make_dual(moved, tangent * (scale if weight is None else scale * weight).view(shape))
    moved, mean, scale = torch.native_batch_norm(primal, weight, bias, running_mean, running_var, True, momentum, eps)
    over = (0, *range(2, input.dim()))
    normal = (primal - mean.view(shape)).mul_(scale.view(shape))
    along = (normal * tangent).mean(over, keepdim=True)
    change = (tangent - tangent.mean(over, keepdim=True)).sub_(normal.mul_(along))
    return forward_ad.make_dual(moved, change.mul_((scale if weight is None else scale * weight).view(shape)))


class Together(Replacing):
    """Inside a dual level: these layers push primal and tangent forward by the rules of this file, without a graph."""

    rules: ClassVar = {
        F.linear: _row_by_row(F.linear, None),
        F.conv1d: _row_by_row(F.conv1d, 3),
        F.conv2d: _row_by_row(F.conv2d, 4),
        F.conv3d: _row_by_row(F.conv3d, 5),
        F.batch_norm: _batch_norm,
    }
