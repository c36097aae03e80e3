"""The same values laid out in memory in different ways; what lies between them is NaN, so that reading it is seen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
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


def stored(rank: int) -> st.SearchStrategy[tuple[list[int], list[int]]]:
    """How a tensor of this rank may be stored: the order of its dimensions, and steps between their elements."""
    steps = st.lists(st.integers(1, 2), min_size=rank, max_size=rank)
    return st.tuples(st.permutations(range(rank)), steps)


def random_in(
    shape: Sequence[int], order: list[int], steps: list[int], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Normal random numbers, stored like that."""
    whole = torch.randn([shape[d] * steps[d] for d in order], generator=generator, dtype=torch.float64).to(dtype)
    tensor = whole.permute([order.index(d) for d in range(len(shape))])
    return tensor[tuple(slice(None, None, step) for step in steps)]
