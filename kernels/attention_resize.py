"""Area average of maps to another size (adaptive average pooling), and its transpose.

With I positions and O cells in one dimension, cell o averages the positions ``[⌊oI/O⌋, ⌈(o+1)I/O⌉)``, and position i
lies in the cells ``[⌊iO/I⌋, ⌈(i+1)O/I⌉)``: the same formula with the grids exchanged. So one function, ``_overlap``,
serves both directions, and both are gathers. These kernels get only maps whose size changes; every size is three
numbers, with ones in front where a map has fewer dimensions.
"""

import triton
import triton.language as tl

from lwkd.kernels.attention_tiles import read_partials
from lwkd.kernels.rows import find_row, read_address

RESIZE_FIELDS = tl.constexpr(9)


@triton.jit
def _volume(sizes_ptr):
    return tl.load(sizes_ptr) * tl.load(sizes_ptr + 1) * tl.load(sizes_ptr + 2)


@triton.jit
def _most_in_one_dimension(n_from, n_to):
    return (n_to + n_from - 1) // n_from + (n_to % n_from != 0).to(tl.int64)


@triton.jit
def _most_overlaps(from_ptr, to_ptr):
    """How many cells of the grid ``to`` overlap one cell of the grid ``from``, at most."""
    most = tl.full((), 1, tl.int64)
    for dimension in tl.static_range(3):
        most *= _most_in_one_dimension(tl.load(from_ptr + dimension), tl.load(to_ptr + dimension))
    return most


@triton.jit
def _overlap(cell, k, from_ptr, to_ptr):
    """The k-th cell of ``to`` that overlaps a cell of ``from``, whether it exists, how many of ``from`` overlap it."""
    found = tl.zeros(cell.shape, tl.int64)
    exists = cell >= 0
    n_back = tl.full(cell.shape, 1, tl.int64)
    stride = tl.full((), 1, tl.int64)
    for reverse in tl.static_range(3):
        n_from, n_to = tl.load(from_ptr + 2 - reverse), tl.load(to_ptr + 2 - reverse)
        most = _most_in_one_dimension(n_from, n_to)
        index = cell % n_from
        cell = cell // n_from
        other = index * n_to // n_from + k % most
        k = k // most
        exists &= other < ((index + 1) * n_to + n_from - 1) // n_from
        n_back *= ((other + 1) * n_from + n_to - 1) // n_to - other * n_from // n_to
        found += stride * other
        stride *= n_to
    return found, exists, n_back


@triton.jit
def attention_resize_fwd(
    partials_ptr,
    table_ptr,  # int64 (rows, RESIZE_FIELDS): partials' offset and number, own sizes, new sizes, offset of the result
    ends_ptr,  # int64 (rows)
    n_rows,
    BLOCK: tl.constexpr,
):
    """Average one block of cells of one sample's map; the result is a whole map, in the same buffer."""
    row, program = find_row(tl.program_id(0), ends_ptr, n_rows)
    fields_ptr = table_ptr + row * RESIZE_FIELDS
    own_ptr, sizes_ptr = fields_ptr + 2, fields_ptr + 5
    n_own, n = _volume(own_ptr), _volume(sizes_ptr)
    n_blocks = (n + BLOCK - 1) // BLOCK
    sample, cell = program // n_blocks, program % n_blocks * BLOCK + tl.arange(0, BLOCK)
    n_partials = tl.load(fields_ptr + 1)
    map_ptr = partials_ptr + tl.load(fields_ptr) + sample * n_partials * n_own
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    for k in tl.range(0, _most_overlaps(sizes_ptr, own_ptr)):
        position, exists, _ = _overlap(cell, k, sizes_ptr, own_ptr)
        total += read_partials(map_ptr, n_partials, n_own, position, exists & (cell < n))
        count += exists.to(tl.float32)
    tl.store(partials_ptr + tl.load(fields_ptr + 8) + sample * n + cell, total / count, mask=cell < n)


@triton.jit
def attention_resize_bwd(
    addresses_ptr,  # int64 (rows, 2): cotangent at the new size, and at the own size (written); float32
    table_ptr,
    ends_ptr,
    n_rows,
    BLOCK: tl.constexpr,
):
    """Transpose of the average, for one block of positions of one sample's map."""
    row, program = find_row(tl.program_id(0), ends_ptr, n_rows)
    own_ptr, sizes_ptr = table_ptr + row * RESIZE_FIELDS + 2, table_ptr + row * RESIZE_FIELDS + 5
    n_own, n = _volume(own_ptr), _volume(sizes_ptr)
    n_blocks = (n_own + BLOCK - 1) // BLOCK
    sample, position = program // n_blocks, program % n_blocks * BLOCK + tl.arange(0, BLOCK)
    cotangent_ptr = read_address(addresses_ptr + row * 2, tl.float32, False) + sample * n
    result_ptr = read_address(addresses_ptr + row * 2 + 1, tl.float32, False) + sample * n_own
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.range(0, _most_overlaps(own_ptr, sizes_ptr)):
        cell, exists, n_back = _overlap(position, k, own_ptr, sizes_ptr)
        total += tl.load(cotangent_ptr + cell, mask=exists & (position < n_own), other=0.0) / n_back
    tl.store(result_ptr + position, total, mask=position < n_own)
