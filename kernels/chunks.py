"""Chunks: tensors of very different sizes, cut up so that all programs have equal work, and the sums over them.

A program reads one chunk of one tensor and writes its partial sums; a second kernel adds the partials of each layer in
float64. Both add in a fixed order and nothing atomically, so the bits never change, and a layer's sum depends on that
layer alone.

Legend: ``L`` layers; rows of a table are tensors: elements, index of the tensor, its first partial.
"""

import triton
import triton.language as tl

from lwkd.kernels.rows import find_row

CHUNK_FIELDS = tl.constexpr(3)


@triton.jit
def own_chunk(table_ptr, ends_ptr, n_rows):
    """This program's row of the table and chunk of the tensor; the tensor's elements and index; the partial's place."""
    row, chunk = find_row(tl.program_id(0), ends_ptr, n_rows)
    fields_ptr = table_ptr + row * CHUNK_FIELDS
    return row, chunk, tl.load(fields_ptr), tl.load(fields_ptr + 1), tl.load(fields_ptr + 2) + chunk


@triton.jit
def sum_partials(partials_ptr, layers_ptr, layer, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """One layer's sums (COLUMNS) in float64 from its partials (number, COLUMNS) in float32."""
    first, count = tl.load(layers_ptr + 2 * layer), tl.load(layers_ptr + 2 * layer + 1)
    column = tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((BLOCK, COLUMNS), tl.float64)
    for start in tl.range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)[:, None]
        place = (first + index) * COLUMNS + column
        total += tl.load(partials_ptr + place, mask=index < count, other=0.0).to(tl.float64)
    return tl.sum(total, 0)
