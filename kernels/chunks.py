"""Chunks: sharing tensors of very different size out among programs of equal work, and adding up what they found.

A program reads one chunk of one tensor and writes the partial sums of it; a second kernel adds the partials of each
layer in float64. Both always go in the same order and nothing is added atomically, so the bits never change, and a
layer's sum depends on that layer alone.

Legend: ``L`` layers; rows of a table are tensors. A plan depends on sizes and dtypes, never on addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton
import triton.language as tl

from lwkd.kernels.launch import find_row

CHUNK_FIELDS = tl.constexpr(3)


@dataclass(frozen=True)
class ChunkGroup:
    """One launch: the tensors of one dtype."""

    dtype: torch.dtype
    tensors: tuple[int, ...]
    """Which of the plan's tensors the rows of the table are."""
    table: tuple[tuple[int, int, int], ...]
    """Per row: elements, index of the tensor, its first partial."""
    ends: tuple[int, ...]
    """Chunks up to and including each row; the last is the grid."""


@dataclass(frozen=True)
class ChunkPlan:
    """Chunks in, partial sums out, and which of those belong to each layer."""

    groups: tuple[ChunkGroup, ...]
    layers: tuple[tuple[int, int], ...]
    """Per layer: first partial, number of partials."""
    partials: int
    """Partials in all."""


def plan_chunks(
    dtypes: Sequence[torch.dtype],
    elements: Sequence[int],
    chunks: Sequence[int],
    layer_of: Sequence[int],
    layers: int,
) -> ChunkPlan:
    """One launch for every dtype; the partials of a layer lie side by side, whatever launches they come from.

    Args:
        dtypes: of each tensor.
        elements: of each tensor.
        chunks: into how many each tensor is cut; none for an empty one.
        layer_of: the layer of each tensor.
        layers: L.

    >>> plan = plan_chunks([torch.float32] * 3, [9, 0, 5], [3, 0, 2], [1, 0, 0], 2)
    >>> plan.layers, plan.groups[0].table, plan.groups[0].ends
    (((0, 2), (2, 3)), ((9, 0, 2), (0, 1, 0), (5, 2, 0)), (3, 3, 5))
    """
    counts = [0] * layers
    for count, layer in zip(chunks, layer_of, strict=True):
        counts[layer] += count
    ends = list(accumulate(counts, initial=0))
    following, first = list(ends), []
    for count, layer in zip(chunks, layer_of, strict=True):
        first.append(following[layer])
        following[layer] += count
    groups = []
    for dtype in dict.fromkeys(dtypes):
        rows = tuple(index for index, other in enumerate(dtypes) if other == dtype)
        table = tuple((elements[index], index, first[index]) for index in rows)
        groups.append(ChunkGroup(dtype, rows, table, tuple(accumulate(chunks[index] for index in rows))))
    return ChunkPlan(tuple(groups), tuple(zip(ends, counts, strict=False)), ends[-1])


@triton.jit
def own_chunk(table_ptr, ends_ptr, n_rows):
    """Which chunk this program has: row of the table, chunk of that tensor, and elements, tensor, partial's place."""
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
