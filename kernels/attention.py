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

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lwkd import reference
from lwkd.kernels.attention_memory import Geometry, gradients_like, matched, readable
from lwkd.kernels.attention_plan import (
    LOOPING_BLOCK,
    MapPlan,
    ResizePlan,
    TilePlan,
    plan_maps,
    plan_resize,
    plan_tiles,
    split_sizes,
)
from lwkd.kernels.attention_power import power_code
from lwkd.kernels.attention_resize import resize, resize_backward
from lwkd.kernels.attention_tiles import feature_gradients, partial_maps, read_partials
from lwkd.kernels.launch import find_row, launch, on_device

EMPTY_MAP = tl.constexpr(reference.EMPTY_MAP)
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
    out_ptr = tl.load(addresses_ptr + layer * N_ADDRESSES).to(tl.pointer_type(tl.float32)) + sample * n
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
        moved_ptr = tl.load(addresses_ptr + layer * 2 + 1).to(tl.pointer_type(tl.float32)) + sample * n
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
    u_ptr = tl.load(addresses_ptr).to(tl.pointer_type(tl.float32)) + sample * n
    a_ptr = tl.load(addresses_ptr + 1).to(tl.pointer_type(tl.float32)) + sample * n
    if TANGENT:
        v_ptr = tl.load(addresses_ptr + 2).to(tl.pointer_type(tl.float32)) + sample * n
        t_ptr = tl.load(addresses_ptr + 3).to(tl.pointer_type(tl.float32)) + sample * n

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


@dataclass(frozen=True)
class _Prepared:
    """Features and tangents as the kernels read them, and what there is to launch."""

    features: list[Tensor]
    tangents: list[Tensor]
    geometries: list[Geometry]
    tiles: TilePlan
    sizes: list[tuple[int, ...]]
    resizing: ResizePlan
    plan: MapPlan

    def maps(self) -> list[Tensor]:
        """Empty maps ``(B, N)``, float32, of the requested sizes."""
        device = self.features[0].device
        return [
            torch.empty(g.samples, math.prod(size), dtype=torch.float32, device=device)
            for g, size in zip(self.geometries, self.sizes, strict=True)
        ]


def _prepare(features: Sequence[Tensor], tangents: Sequence[Tensor], sizes: Sequence[int]) -> _Prepared:
    if tangents:
        features, tangents = matched(features, tangents)
    read, geometries = readable(features, "the feature")
    # Equal strides before, so equal strides after.
    read_tangents, _ = readable(tangents, "the tangent")
    layer_sizes = split_sizes(geometries, sizes)
    tiles = plan_tiles(geometries)
    resizing = plan_resize(geometries, tiles, layer_sizes)
    plan = plan_maps(geometries, resizing.places, layer_sizes)
    return _Prepared(read, read_tangents, geometries, tiles, layer_sizes, resizing, plan)


def _summed_maps(prepared: _Prepared, power: float) -> tuple[Tensor, Tensor | None]:
    """Partial and resized maps, and those of the tangents."""
    partials, moved = partial_maps(
        prepared.tiles, prepared.resizing.length, prepared.features, prepared.tangents, power, power_code(power)
    )
    resize(prepared.resizing, partials)
    if moved is not None:
        resize(prepared.resizing, moved)
    return partials, moved


def _addresses(operands: Sequence[Sequence[Tensor]]) -> list[list[int]]:
    """One row a layer."""
    return [[tensor.data_ptr() for tensor in layer] for layer in zip(*operands, strict=True)]


def attention_maps(
    features: Sequence[Tensor], tangents: Sequence[Tensor], power: float, sizes: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Launch the op ``lwkd::attention_maps``: maps ``(B, N)`` float32, and map tangents where tangents are given.

    Formulas at the head of this file and in :func:`lwkd.reference.attention_maps`. Two launches however many layers
    (the first once for every dtype, memory order and divisibility by the vector width among the features), one or
    two more where sizes change.

    Raises:
        TypeError: a dtype that the kernels do not read.
        ValueError: sizes that do not fit the features.
    """
    prepared = _prepare(features, tangents, sizes)
    outputs = [prepared.maps() for _ in range(2 if tangents else 1)]
    plan, device = prepared.plan, features[0].device
    launch(
        attention_maps_fwd,
        plan.ends[-1],
        device,
        *_summed_maps(prepared, power),
        on_device(plan.table, device),
        on_device(plan.ends, device),
        on_device(_addresses(outputs), device),
        len(plan.table),
        MORE=plan.more,
        BLOCK=plan.block,
        num_warps=plan.warps,
    )
    return outputs[0], outputs[1] if tangents else []


def attention_maps_backward(
    grad_maps: Sequence[Tensor],
    grad_map_tangents: Sequence[Tensor],
    features: Sequence[Tensor],
    tangents: Sequence[Tensor],
    power: float,
    sizes: Sequence[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """Launch ``lwkd::attention_maps_backward``: gradients of the features, and of the tangents where there are any.

    Three launches: partial maps again (nothing but the inputs was kept), cotangents of the maps, gradients; up to
    four more where sizes change.

    Raises:
        TypeError: a dtype that the kernels do not read.
        ValueError: sizes that do not fit the features.
    """
    prepared = _prepare(features, tangents, sizes)
    partials = _summed_maps(prepared, power)
    sides = [(grad_maps, prepared.features), (grad_map_tangents, prepared.tangents)][: 2 if tangents else 1]
    grads = [[grad.float().contiguous() for grad in grads] for grads, _ in sides]
    resized = [prepared.maps() for _ in sides]
    plan, device, (block, warps) = prepared.plan, features[0].device, LOOPING_BLOCK
    launch(
        attention_maps_bwd,
        plan.ends[-1],
        device,
        *partials,
        on_device(plan.table, device),
        on_device(plan.ends, device),
        on_device(_addresses([each for pair in zip(grads, resized, strict=True) for each in pair]), device),
        len(plan.table),
        BLOCK=block,
        num_warps=warps,
    )
    own = [
        [
            cotangent if g.spatial == size else torch.empty(g.samples, g.positions, device=cotangent.device)
            for cotangent, g, size in zip(cotangents, prepared.geometries, prepared.sizes, strict=True)
        ]
        for cotangents in resized
    ]
    resize_backward(prepared.resizing, resized, own)
    operands: list[Sequence[Tensor]] = []
    for cotangents, (_, inputs) in zip(own, sides, strict=True):
        operands += [inputs, cotangents, gradients_like(inputs, prepared.geometries)]
    feature_gradients(prepared.tiles, operands, None, power, power_code(power))
    return list(operands[2]), list(operands[5]) if tangents else []
