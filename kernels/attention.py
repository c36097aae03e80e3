r"""Normalised attention maps, their tangents, and the backward of both.

Legend: ``r`` a map after resizing (see attention_resize), ``R = Σ r``, ``q = r/R``; dots are tangents.

Forward: partial maps (attention_tiles), then one launch for

    q = r/R,    q̇ = (ṙ − q·Ṙ)/R

Backward, with u = dL/dq and v = dL/dq̇. Both depend on r twice, through the quotient and through R:

    dL/dṙ = (v − Σ v·q)/R
    dL/dr = (u' − Σ u'·q)/R − (Σ v·q̇)/R,    u' = u − v·Ṙ/R

Forward returns q, q̇ and the totals R and Ṙ, of which backward forms this without the features. A last launch
(attention_tiles) multiplies these cotangents out over the channels. A map with R < 1e-24 is the uniform map, with
tangent and gradients 0, and has a total of 0. Where sizes are given that are not the maps' own, the resizing and its
transpose are launches in between. Large maps take one launch more (attention_split).
"""

import triton
import triton.language as tl

from lwkd.kernels.attention_split import SUMS, own_segment, read_map, read_sum, sum_map, sum_segments
from lwkd.kernels.rows import find_row, read_address

EMPTY_MAP = tl.constexpr(1e-24)
"""A map whose sum is below this counts as the uniform map; equal to the reference's, which a test checks."""

LARGEST_MAP = tl.constexpr(2.0**126)
"""Beyond this a GPU's quotients are 0, as all are by an infinite sum."""

MAP_FIELDS = tl.constexpr(6)
"""Of a layer: offset and number of its partial maps, N, positions of a segment, its first program and sample."""


@triton.jit
def divisor(total, empty):
    """What a map is divided by: its sum, 1 where it is empty, and NaN where float32 does not hold what is to be."""
    return tl.where(empty, 1.0, tl.where(total <= LARGEST_MAP, total, float("nan")))


@triton.jit
def _normalise(
    partials_ptr,  # of the map
    tangent_partials_ptr,  # or None, as moved_ptr
    parts,
    n,
    begin,
    last,
    n_segments,
    own_sums_ptr,  # or None: what the phases leave behind of this segment
    map_sums_ptr,  # or None: the same of the map's first segment
    totals_ptr,  # of the map
    out_ptr,
    moved_ptr,
    PHASE: tl.constexpr,
    MORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One phase of normalising a segment of a map, and its tangent."""
    TANGENT: tl.constexpr = tangent_partials_ptr is not None
    cells = begin + tl.arange(0, BLOCK)
    valid = cells < last
    rest = begin + BLOCK
    end = last if MORE else rest

    moved_total = tl.zeros((), tl.float32)
    if PHASE != "rest":
        r = read_map(partials_ptr, parts, n, begin, last, PHASE, BLOCK)
        if TANGENT:
            moved = read_map(tangent_partials_ptr, parts, n, begin, last, PHASE, BLOCK)
            moved_total = sum_map(moved, tangent_partials_ptr, parts, n, begin, last, MORE, BLOCK)
        total = sum_map(r, partials_ptr, parts, n, begin, last, MORE, BLOCK)
    if PHASE == "sums":
        tl.store(own_sums_ptr, total)
        tl.store(own_sums_ptr + 1, moved_total)
    else:
        if PHASE == "rest":
            total = sum_segments(map_sums_ptr, n_segments)
            moved_total = sum_segments(map_sums_ptr + 1, n_segments)
            r = read_sum(partials_ptr, cells, valid)
            if TANGENT:
                moved = read_sum(tangent_partials_ptr, cells, valid)
        elif MORE:
            tl.debug_barrier()  # behind what other threads have written
        empty = total < EMPTY_MAP
        scale = 1.0 / divisor(total, empty)
        q = tl.where(empty, 1.0 / n, r * scale)
        tl.store(out_ptr + cells, q, mask=valid)
        tl.store(totals_ptr, tl.where(empty, 0.0, total), mask=begin == 0)
        if TANGENT:
            tl.store(totals_ptr + 1, moved_total, mask=begin == 0)
            tl.store(moved_ptr + cells, tl.where(empty, 0.0, (moved - q * moved_total) * scale), mask=valid)
        for start in tl.range(rest, end, BLOCK):
            more_cells = start + tl.arange(0, BLOCK)
            q = read_sum(partials_ptr, more_cells, more_cells < last) * scale
            tl.store(out_ptr + more_cells, tl.where(empty, 1.0 / n, q), mask=more_cells < last)
            if TANGENT:
                more = read_sum(tangent_partials_ptr, more_cells, more_cells < last)
                tangent = (more - q * moved_total) * scale
                tl.store(moved_ptr + more_cells, tl.where(empty, 0.0, tangent), mask=more_cells < last)


@triton.jit
def attention_maps_fwd(
    partials_ptr,
    tangent_partials_ptr,  # or None
    totals_ptr,  # float32 (samples of all layers, 1 or 2), written: R, Ṙ
    table_ptr,  # int64 (layers, MAP_FIELDS)
    ends_ptr,  # int64 (layers)
    sums_ptr,  # float32 (programs, SUMS), or None: what the phases leave behind
    addresses_ptr,  # int64 (layers, 1 or 2): map, map tangent, float32 (B, N)
    n_layers,
    PHASE: tl.constexpr,  # "whole"; or "sums", then "rest", of every segment
    MORE: tl.constexpr,  # whether some program has more than BLOCK positions
    BLOCK: tl.constexpr,
):
    """One program normalises one sample of one layer, or a segment of it."""
    TANGENT: tl.constexpr = tangent_partials_ptr is not None
    N_ADDRESSES: tl.constexpr = 2 if TANGENT else 1
    layer, program = find_row(tl.program_id(0), ends_ptr, n_layers)
    fields_ptr = table_ptr + layer * MAP_FIELDS
    parts, n = tl.load(fields_ptr + 1), tl.load(fields_ptr + 2)
    sample, begin, last, n_segments = own_segment(program, n, fields_ptr + 3, PHASE)
    place = tl.load(fields_ptr) + sample * parts * n
    partials_ptr += place
    totals_ptr += (tl.load(fields_ptr + 5) + sample) * N_ADDRESSES
    own_sums_ptr, map_sums_ptr, out_ptr, moved_ptr = None, None, None, None
    if PHASE != "whole":
        sums_ptr += tl.load(fields_ptr + 4) * SUMS
        own_sums_ptr = sums_ptr + program * SUMS
        map_sums_ptr = sums_ptr + sample * n_segments * SUMS
    if PHASE != "sums":
        out_ptr = read_address(addresses_ptr + layer * N_ADDRESSES, tl.float32, False) + sample * n
    if TANGENT:
        tangent_partials_ptr += place
        moved_ptr = read_address(addresses_ptr + layer * 2 + 1, tl.float32, False) + sample * n

    SMALL: tl.constexpr = BLOCK // 4
    where = (parts, n, begin, last, n_segments, own_sums_ptr, map_sums_ptr, totals_ptr, out_ptr, moved_ptr)
    if not MORE and n <= SMALL:
        _normalise(partials_ptr, tangent_partials_ptr, *where, PHASE, MORE, SMALL)
    else:
        _normalise(partials_ptr, tangent_partials_ptr, *where, PHASE, MORE, BLOCK)


@triton.jit
def attention_maps_bwd(
    totals_ptr,  # as forward wrote them
    table_ptr,
    ends_ptr,
    sums_ptr,
    addresses_ptr,  # int64 (layers, 3 or 6): q, dL/dq, dL/dr (written); q̇, dL/dq̇, dL/dṙ (written); float32 (B, N)
    n_layers,
    PHASE: tl.constexpr,
    TANGENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cotangents of the maps before normalising, for one sample of one layer, or a segment of it."""
    SIDES: tl.constexpr = 2 if TANGENT else 1
    layer, program = find_row(tl.program_id(0), ends_ptr, n_layers)
    fields_ptr = table_ptr + layer * MAP_FIELDS
    n = tl.load(fields_ptr + 2)
    sample, begin, last, n_segments = own_segment(program, n, fields_ptr + 3, PHASE)
    addresses_ptr += layer * 3 * SIDES
    q_ptr = read_address(addresses_ptr, tl.float32, False) + sample * n
    u_ptr = read_address(addresses_ptr + 1, tl.float32, False) + sample * n
    if TANGENT:
        moved_ptr = read_address(addresses_ptr + 3, tl.float32, False) + sample * n
        v_ptr = read_address(addresses_ptr + 4, tl.float32, False) + sample * n

    zero = tl.zeros((), tl.float32)
    sum_uq, sum_vq, sum_vm = zero, zero, zero
    if PHASE == "rest":
        sums_ptr += (tl.load(fields_ptr + 4) + sample * n_segments) * SUMS
        sum_uq = sum_segments(sums_ptr, n_segments)
        if TANGENT:
            sum_vq, sum_vm = sum_segments(sums_ptr + 1, n_segments), sum_segments(sums_ptr + 2, n_segments)
    else:
        for start in tl.range(begin, last, BLOCK):
            cells = start + tl.arange(0, BLOCK)
            q = tl.load(q_ptr + cells, mask=cells < last, other=0.0)
            sum_uq += tl.sum(q * tl.load(u_ptr + cells, mask=cells < last, other=0.0))
            if TANGENT:
                v = tl.load(v_ptr + cells, mask=cells < last, other=0.0)
                sum_vq += tl.sum(v * q)
                sum_vm += tl.sum(v * tl.load(moved_ptr + cells, mask=cells < last, other=0.0))
    if PHASE == "sums":
        sums_ptr += (tl.load(fields_ptr + 4) + program) * SUMS
        tl.store(sums_ptr, sum_uq)
        tl.store(sums_ptr + 1, sum_vq)
        tl.store(sums_ptr + 2, sum_vm)
    else:
        a_ptr = read_address(addresses_ptr + 2, tl.float32, False) + sample * n
        if TANGENT:
            t_ptr = read_address(addresses_ptr + 5, tl.float32, False) + sample * n
        totals_ptr += (tl.load(fields_ptr + 5) + sample) * SIDES
        total = tl.load(totals_ptr)
        empty = total == 0.0
        scale = tl.where(empty, 0.0, 1.0 / divisor(total, empty))
        growth = zero
        if TANGENT:
            growth = tl.load(totals_ptr + 1) * scale
        shift = sum_uq - sum_vq * growth + sum_vm
        for start in tl.range(begin, last, BLOCK):
            cells = start + tl.arange(0, BLOCK)
            u = tl.load(u_ptr + cells, mask=cells < last, other=0.0)
            if TANGENT:
                v = tl.load(v_ptr + cells, mask=cells < last, other=0.0)
                u -= v * growth
                tl.store(t_ptr + cells, (v - sum_vq) * scale, mask=cells < last)
            tl.store(a_ptr + cells, (u - shift) * scale, mask=cells < last)
