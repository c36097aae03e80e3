"""How a program finds its row: the first step of every kernel that covers many tensors in one launch.

All grids are flat. A table has a row for each tensor; running totals of the programs of the rows, ``ends``, tell a
program which row is its own: it comes after as many rows as there are totals that do not exceed the program's number.
"""

import triton
import triton.language as tl

FIND = tl.constexpr(128)
"""Running totals that are compared at once."""


@triton.jit
def find_row(program, ends_ptr, n_rows):
    """The row that a program belongs to, and its number within that row."""
    passed = tl.zeros((), tl.int64)
    for first in tl.range(0, n_rows, FIND):
        index = first + tl.arange(0, FIND)
        end = tl.load(ends_ptr + index, mask=index < n_rows, other=2**31)
        # How many rows are passed and where the last of them ends, in one number: one search finds both.
        passed = tl.maximum(passed, tl.max(tl.where(end <= program, (index + 1).to(tl.int64) << 32 | end, 0)))
    return (passed >> 32).to(tl.int32), program - (passed & 0xFFFFFFFF)


@triton.jit
def read_address(addresses_ptr, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer from a table of addresses; in the aligned variant the host has checked that 16 divides it."""
    pointer = tl.load(addresses_ptr).to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer
