"""The same values laid out in memory in different ways; what lies between them is NaN, so that reading it is seen."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if tensor.dim() > 2 else tensor


def sliced(tensor: Tensor) -> Tensor:
    wide = tensor.new_full((*tensor.shape, 2), math.nan)
    wide[..., 1] = tensor
    return wide[..., 1]


def unaligned(tensor: Tensor) -> Tensor:
    flat = tensor.new_full((tensor.numel() + 1,), math.nan)
    flat[1:] = tensor.flatten()
    return flat[1:].view(tensor.shape)


LAYOUTS = {"contiguous": torch.clone, "channels_last": channels_last, "sliced": sliced, "unaligned": unaligned}
