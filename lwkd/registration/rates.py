"""Fake kernel of the rate update, which has no gradient."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.register_fake("lwkd::update_rates")
def _update_rates_fake(
    average: Tensor,
    baseline: Tensor,
    divergences: Tensor,
    multipliers: Tensor,
    counts: Tensor,
    statistics: Tensor,
    divergence: str,
    policy: str,
    gamma: float,
    momentum: float,
    clamp: list[float],
    normalize: bool,
    found_inf: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    state = (average, baseline, divergences, multipliers, counts)
    contiguous = [t.new_empty(t.shape) for t in state]
    return contiguous[0], contiguous[1], contiguous[2], contiguous[3], contiguous[4]
