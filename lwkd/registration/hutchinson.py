"""Fake kernels of the Hutchinson ops, which have no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from lwkd.registration.gradients import accumulation


@torch.library.register_fake("lwkd::rademacher")
def _rademacher_fake(like: list[Tensor], seed: int) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in like]


@torch.library.register_fake("lwkd::hutchinson_trace")
def _hutchinson_trace_fake(products: list[Tensor], layer_of: list[int], seed: int, layers: int) -> Tensor:
    return products[0].new_empty((layers,), dtype=accumulation(*products))
