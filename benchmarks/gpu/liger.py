"""Liger-Kernel's Jensen–Shannon divergence, beside the attention divergence on CUDA.

Its kernel takes log-probabilities ``(rows, columns)`` of one layer and returns their mean over rows; β = ½ weighs both
sides alike, and a probability of exactly 0 gives NaN. It makes no maps, so it is given those of lwkd, the fastest there
are: what is compared is the distance, layer by layer, against one call that never writes the maps. It forms the
gradient on the way, whether asked for it or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from lwkd import ops


def why_not(device: torch.device) -> str | None:
    """What keeps it from running, or None."""
    if device.type != "cuda":
        return f"its kernels are for GPUs, and this is {device}"
    if find_spec("liger_kernel") is None:
        return "liger_kernel is not installed: pip install --group bench"
    return None


def divergence(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """``(L,)``; maps of student and teacher have equal sizes, and no map has a zero."""
    from liger_kernel.transformers import LigerJSD  # imports Triton: only where it is going to run

    jsd = LigerJSD(beta=0.5)
    maps = zip(ops.attention_maps(student), ops.attention_maps(teacher), strict=True)
    return torch.stack([jsd(map_S.log(), map_T.log()) for map_S, map_T in maps])
