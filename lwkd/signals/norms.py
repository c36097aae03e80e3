"""Normalisations in plain arithmetic, for derivatives of second order in forward mode.

torch (2.11) loses the dependence of the saved mean and deviation on the input there, without a word: second derivatives
through ``batch_norm`` in train mode, ``instance_norm`` and ``layer_norm`` are 8 to 110 % off. First derivatives, double
backward and ``group_norm`` are right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from lwkd.signals.replacing import Replacing


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
    return _normalised(input, (0, *range(2, input.dim())), weight, bias, eps, channels=True) if training else None


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    return _normalised(input, range(2, input.dim()), weight, bias, eps, channels=True) if use_input_stats else None


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _normalised(input, range(-len(normalized_shape), 0), weight, bias, eps, channels=False)


def _normalised(
    x: Tensor, over: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float, *, channels: bool
) -> Tensor:
    dims = tuple(over)
    off = x - x.mean(dims, keepdim=True)
    found = off * (off.square().mean(dims, keepdim=True) + eps).rsqrt()
    shape = (-1, *[1] * (x.dim() - 2)) if channels else None
    if weight is not None:
        found = found * (weight if shape is None else weight.view(shape))
    if bias is not None:
        found = found + (bias if shape is None else bias.view(shape))
    return found


class WrittenOut(Replacing):
    """Inside, the normalisations of ``torch.nn.functional`` are written out; running statistics are not updated."""

    rules: ClassVar = {F.batch_norm: _batch_norm, F.instance_norm: _instance_norm, F.layer_norm: _layer_norm}
