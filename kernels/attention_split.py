"""Large maps are split: which part of which map a program of the second stage has, and sums over the parts of a map.

Maps of up to 4,096 positions have one program each, which does all that is to be done between the partial maps and the
result (PHASE ``whole``). If a call has larger ones, its maps are cut into segments, each with a program of its own, and
what needs a sum over a whole map waits for the next launch: one launch a phase, however many layers and maps there are.
Sums over segments are written down and added up in a fixed order, so that the bits do not depend on who was first.

Within a program a map is gone over in blocks. The first stays in registers, and the others come again as often as they
are needed, by loops that a map of one block does not enter. Only segments and rows of self-attention probabilities have
more than one. The block is made for the largest map of the call; maps that fit into a quarter of it take that instead,
since positions that do not exist cost as much time as others.
"""

import triton
import triton.language as tl

from lwkd.kernels.attention_tiles import read_partials

SUMS = tl.constexpr(8)
"""Floats that a program leaves behind for the next phase."""

SEGMENTS = tl.constexpr(64)
"""Segments whose sums are read at once."""


@triton.jit
def own_segment(program, n, segment_ptr, PHASE: tl.constexpr):
    """Of a program of a layer: its map, the range of its positions, the number of its map's segments."""
    if PHASE == "whole":
        return program, program * 0, n, program * 0 + 1
    segment = tl.load(segment_ptr)
    n_segments = (n + segment - 1) // segment
    number = (program.to(tl.int32) // n_segments.to(tl.int32)).to(tl.int64)
    begin = (program - number * n_segments) * segment
    return number, begin, tl.minimum(begin + segment, n), n_segments


@triton.jit
def sum_segments(sums_ptr, n_segments):
    """A sum over the segments of a map; ``sums_ptr`` points to that of the first."""
    total = tl.zeros((), tl.float32)
    for start in tl.range(0, n_segments, SEGMENTS):
        index = start + tl.arange(0, SEGMENTS)
        total += tl.sum(tl.load(sums_ptr + index * SUMS, mask=index < n_segments, other=0.0))
    return total


@triton.jit
def _add_partials(map_ptr, n_partials, step, cells, valid):
    """A map at some positions; the sum takes the place of the first partial map, where :func:`read_sum` finds it."""
    total = read_partials(map_ptr, n_partials, step, cells, valid)
    tl.store(map_ptr + cells, total, mask=valid & (n_partials > 1))
    return total


@triton.jit
def read_sum(map_ptr, cells, valid):
    """A map at some positions where :func:`sum_map` has been, in an earlier launch or before a barrier."""
    return tl.load(map_ptr + cells, mask=valid, other=0.0)


@triton.jit
def read_map(map_ptr, n_partials, step, begin, last, PHASE: tl.constexpr, BLOCK: tl.constexpr):
    """A map at the first positions of a range."""
    cells = begin + tl.arange(0, BLOCK)
    if PHASE == "whole":
        return read_partials(map_ptr, n_partials, step, cells, cells < last)
    return _add_partials(map_ptr, n_partials, step, cells, cells < last)


@triton.jit
def sum_map(first, map_ptr, n_partials, step, begin, last, MORE: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of a map over a range, of which :func:`read_map` has read the ``first`` positions."""
    total = tl.sum(first)
    if MORE:
        for start in tl.range(begin + BLOCK, last, BLOCK):
            cells = start + tl.arange(0, BLOCK)
            total += tl.sum(_add_partials(map_ptr, n_partials, step, cells, cells < last))
    return total
