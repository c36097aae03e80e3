"""What every kernel file needs to start a kernel: finding one's row on the device, tables and grids on the host.

All grids are flat. Where one launch covers many tensors, a table has a row for each, and running totals of the rows'
programs tell a program which row is its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

FIND = tl.constexpr(512)
"""Running totals that are compared at once."""

ELEMENTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
"""What the elements of a tensor are called in a kernel."""


@triton.jit
def find_row(program, ends_ptr, n_rows):
    """The row that a program belongs to, and its number within that row."""
    row = tl.zeros((), tl.int32)
    start = tl.zeros((), tl.int64)
    for first in tl.range(0, n_rows, FIND):
        index = first + tl.arange(0, FIND)
        end = tl.load(ends_ptr + index, mask=index < n_rows, other=2**62)
        row += tl.sum((end <= program).to(tl.int32))
        start = tl.maximum(start, tl.max(tl.where(end <= program, end, 0)))
    return row, program - start


@triton.jit
def read_address(addresses_ptr, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer from a table of addresses; in the aligned variant the host has checked that 16 divides it."""
    pointer = tl.load(addresses_ptr).to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


def on_device(values: Sequence, device: torch.device) -> Tensor:
    """An int64 table on the device."""
    return torch.tensor(values, dtype=torch.int64, device=device)


def launch(kernel, programs: int, device: torch.device, *arguments, **options) -> None:
    """Run a kernel on a flat grid of the tensors' device; nothing for an empty grid (an empty batch)."""
    if programs:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[(programs,)](*arguments, **options)
