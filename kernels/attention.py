r"""Normalised attention maps, their tangents, and the backward of both.

Legend: ``r`` a map after resizing (see attention_resize), ``R = Σ r``, ``q = r/R``; dots are tangents.

Forward: partial maps (attention_tiles), then one launch for

    q = r/R,    q̇ = (ṙ − q·Ṙ)/R

Backward, with u = dL/dq and v = dL/dq̇. Both depend on r twice, through the quotient and through R:

    dL/dṙ = (v − Σ v·q)/R
    dL/dr = (u' − Σ u'·q)/R − (Σ v·q̇)/R,    u' = u − v·Ṙ/R

All sums come from five that are linear in the data, R, Ṙ, Σ u·r, Σ v·r and Σ v·ṙ, in one reading of the maps:
Σ v·q = Σvr/R, Σ u'·q = (Σur − Σvr·Ṙ/R)/R, Σ v·q̇ = (Σvṙ − Ṙ·Σvr/R)/R. A last launch (attention_tiles) multiplies
these cotangents out over the channels. A map with R < 1e-24 is the uniform map, with tangent and gradients 0.
Where sizes are given that are not the maps' own, the resizing and its transpose are launches in between.
"""

import triton
import triton.language as tl

from lwkd.kernels.attention_tiles import read_partials
from lwkd.kernels.rows import find_row, read_address

EMPTY_MAP = tl.constexpr(1e-24)
"""A map whose sum is below this counts as the uniform map; equal to the reference's, which a test checks."""

MAP_FIELDS = tl.constexpr(3)


@triton.jit
def attention_maps_fwd(
    partials_ptr,
    tangent_partials_ptr,  # or None
    table_ptr,  # int64 (layers, MAP_FIELDS): partials' offset and number, N
    ends_ptr,  # int64 (layers)
    addresses_ptr,  # int64 (layers, 1 or 2): map, map tangent, float32 (B, N)
    n_layers,
    MORE: tl.constexpr,  # whether some map is larger than BLOCK
    BLOCK: tl.constexpr,
):
    """One program normalises one sample of one layer; the first BLOCK positions stay in registers."""
    TANGENT: tl.constexpr = tangent_partials_ptr is not None
    N_ADDRESSES: tl.constexpr = 2 if TANGENT else 1
    layer, sample = find_row(tl.program_id(0), ends_ptr, n_layers)
    fields_ptr = table_ptr + layer * MAP_FIELDS
    parts, n = tl.load(fields_ptr + 1), tl.load(fields_ptr + 2)
    place = tl.load(fields_ptr) + sample * parts * n
    cells = tl.arange(0, BLOCK)
    end = n if MORE else 0

    r = read_partials(partials_ptr + place, parts, n, cells, cells < n)
    total = tl.sum(r)
    for start in tl.range(BLOCK, end, BLOCK):
        total += tl.sum(read_partials(partials_ptr + place, parts, n, start + cells, start + cells < n))
    empty = total < EMPTY_MAP
    scale = 1.0 / tl.where(empty, 1.0, total)
    out_ptr = read_address(addresses_ptr + layer * N_ADDRESSES, tl.float32, False) + sample * n
    q = tl.where(empty, 1.0 / n, r * scale)
    tl.store(out_ptr + cells, q, mask=cells < n)
    for start in tl.range(BLOCK, end, BLOCK):
        more = read_partials(partials_ptr + place, parts, n, start + cells, start + cells < n)
        tl.store(out_ptr + start + cells, tl.where(empty, 1.0 / n, more * scale), mask=start + cells < n)

    if TANGENT:
        moved = read_partials(tangent_partials_ptr + place, parts, n, cells, cells < n)
        moved_total = tl.sum(moved)
        for start in tl.range(BLOCK, end, BLOCK):
            moved_total += tl.sum(
                read_partials(tangent_partials_ptr + place, parts, n, start + cells, start + cells < n)
            )
        moved_ptr = read_address(addresses_ptr + layer * 2 + 1, tl.float32, False) + sample * n
        tl.store(moved_ptr + cells, tl.where(empty, 0.0, (moved - q * moved_total) * scale), mask=cells < n)
        for start in tl.range(BLOCK, end, BLOCK):
            valid = start + cells < n
            more = read_partials(partials_ptr + place, parts, n, start + cells, valid)
            more_moved = read_partials(tangent_partials_ptr + place, parts, n, start + cells, valid)
            tangent = (more_moved - more * scale * moved_total) * scale
            tl.store(moved_ptr + start + cells, tl.where(empty, 0.0, tangent), mask=valid)


@triton.jit
def attention_maps_bwd(
    partials_ptr,
    tangent_partials_ptr,  # or None
    table_ptr,
    ends_ptr,
    addresses_ptr,  # int64 (layers, 2 or 4): dL/dq, dL/dr (written); dL/dq̇, dL/dṙ (written); float32 (B, N)
    n_layers,
    BLOCK: tl.constexpr,
):
    """Cotangents of the maps before normalising, for one sample of one layer."""
    TANGENT: tl.constexpr = tangent_partials_ptr is not None
    N_ADDRESSES: tl.constexpr = 4 if TANGENT else 2
    layer, sample = find_row(tl.program_id(0), ends_ptr, n_layers)
    fields_ptr = table_ptr + layer * MAP_FIELDS
    parts, n = tl.load(fields_ptr + 1), tl.load(fields_ptr + 2)
    place = tl.load(fields_ptr) + sample * parts * n
    addresses_ptr += layer * N_ADDRESSES
    u_ptr = read_address(addresses_ptr, tl.float32, False) + sample * n
    a_ptr = read_address(addresses_ptr + 1, tl.float32, False) + sample * n
    if TANGENT:
        v_ptr = read_address(addresses_ptr + 2, tl.float32, False) + sample * n
        t_ptr = read_address(addresses_ptr + 3, tl.float32, False) + sample * n

    zero = tl.zeros((), tl.float32)
    total, moved_total, sum_ur, sum_vr, sum_vm = zero, zero, zero, zero, zero
    for start in tl.range(0, n, BLOCK):
        cells = start + tl.arange(0, BLOCK)
        r = read_partials(partials_ptr + place, parts, n, cells, cells < n)
        total += tl.sum(r)
        sum_ur += tl.sum(r * tl.load(u_ptr + cells, mask=cells < n, other=0.0))
        if TANGENT:
            moved = read_partials(tangent_partials_ptr + place, parts, n, cells, cells < n)
            v = tl.load(v_ptr + cells, mask=cells < n, other=0.0)
            moved_total += tl.sum(moved)
            sum_vr += tl.sum(v * r)
            sum_vm += tl.sum(v * moved)
    empty = total < EMPTY_MAP
    scale = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
    growth = moved_total * scale
    mean_v = sum_vr * scale
    shift = (sum_ur - sum_vr * growth) * scale + (sum_vm - moved_total * mean_v) * scale

    for start in tl.range(0, n, BLOCK):
        cells = start + tl.arange(0, BLOCK)
        u = tl.load(u_ptr + cells, mask=cells < n, other=0.0)
        if TANGENT:
            v = tl.load(v_ptr + cells, mask=cells < n, other=0.0)
            u -= v * growth
            tl.store(t_ptr + cells, (v - mean_v) * scale, mask=cells < n)
        tl.store(a_ptr + cells, (u - shift) * scale, mask=cells < n)
