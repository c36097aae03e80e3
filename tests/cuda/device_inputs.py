"""Where the tests of this folder run, fresh random inputs, and tensors moved there with their strides and offsets."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from cases import Case, build
from torch import Tensor

DEVICE = torch.device(os.environ.get("LWKD_TEST_DEVICE", "cuda:0"))
SEED = int(os.environ.get("LWKD_TEST_SEED", time.time_ns() % 2**31))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def moved(tensor: Tensor, device: torch.device = DEVICE) -> Tensor:
    """The tensor on the device, with its strides and its offset: ``.to`` would make it dense and aligned."""
    storage = tensor.untyped_storage()
    count = storage.nbytes() // tensor.element_size()
    whole = torch.tensor([], dtype=tensor.dtype).set_(storage, 0, (count,))
    return whole.to(device, copy=True).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def all_moved(tensors: Sequence[Tensor], device: torch.device = DEVICE) -> list[Tensor]:
    """Each of them, detached."""
    return [moved(tensor.detach(), device) for tensor in tensors]


def fresh(case: Case, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Student's and teacher's features of a case, on the CPU, with the random numbers of this run."""
    return build(replace(case, name=f"{case.name} {SEED}"), dtype)


def generator(number: int = 0) -> torch.Generator:
    """A seeded generator of the CPU; equal numbers give equal random numbers within a run."""
    return torch.Generator().manual_seed(SEED + number)


def randoms(shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32, number: int = 0) -> list[Tensor]:
    """Normal random numbers, on the CPU."""
    source = generator(number)
    return [torch.randn(tuple(shape), generator=source, dtype=torch.float64).to(dtype) for shape in shapes]
