"""Sums over the ranks of ``torch.distributed``."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """How many ranks there are; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(tensor: Tensor) -> Tensor:
    """The sum over all ranks, on the device of the tensor, which may be overwritten. Every rank has to call it.

    The sum is formed on that device where the default process group has a backend for it (NCCL has none for the CPU),
    else on the current device of a kind for which it has one.
    """
    if world_size() == 1:
        return tensor
    kinds = [part.partition(":")[0] for part in dist.get_backend_config().split(",")]
    together = tensor if tensor.device.type in kinds else tensor.to(torch.device(kinds[0]))
    dist.all_reduce(together)
    return together.to(tensor.device)
