"""How the attention kernels divide their work: pure Python, no device, no Triton.

A plan depends only on the geometry of the features, never on their addresses, so that whoever launches the kernels
can keep it, and its tables on the device, for as long as the shapes stay the same.

Legend: ``B C N`` batch, channels, map positions of one feature; ``V`` elements in 16 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lwkd.kernels.attention_memory import TILE_COLUMNS, Geometry

LINE_BYTES = 128
"""Bytes of one row of a tile of a channels-last feature: one memory transaction."""

STEP = 2048
"""Elements one step of a program reads: 16 a thread, which keeps the registers few."""

SMALLEST_TILE, LARGEST_TILE = 8192, 65536
"""Bytes that one program reads in all."""

PROGRAMS = 132 * 8
"""Programs that keep a large GPU busy: processors times resident programs."""

MOST_CHUNKS = 16
"""Cuts along the channels of one feature, at most: every cut is one more partial map to read back."""

RESIZE_BLOCK = 256
"""Map positions a program resizes."""

BLOCKS = ((256, 1), (1024, 4), (4096, 8))
"""Map positions that a program of the second stage holds in registers, and its warps."""

LOOPING_BLOCK = (1024, 4)
"""The same for programs that go over their maps again and again since they do not fit."""


@dataclass(frozen=True)
class MapPlace:
    """Where the partial maps of one feature lie: ``(B, partials, N)`` from ``offset`` on."""

    offset: int
    partials: int


@dataclass(frozen=True)
class TileGroup:
    """One launch of the tile kernels: features of one dtype, memory order and divisibility."""

    dtype: torch.dtype
    channels_last: bool
    wide: bool
    features: tuple[int, ...]
    """Which of the plan's features the rows of the table are."""
    table: tuple[tuple[int, ...], ...]
    """Per row: sample stride, rows, columns, rows or columns per chunk, chunks, blocks, N, partials' offset."""
    ends: tuple[int, ...]
    """Programs up to and including each row; the last is the grid."""


@dataclass(frozen=True)
class TilePlan:
    """The first stage for all features: tiles in, partial maps out."""

    groups: tuple[TileGroup, ...]
    places: tuple[MapPlace, ...]
    partials: int
    """Length of the buffer of partial maps, in float32."""


def tile_shape(dtype: torch.dtype, channels_last: bool, aligned: bool) -> tuple[int, int]:
    """Rows and columns that one program reads in one step: 2,048 elements, or half of that read narrowly.

    Narrow loads need an address each, and registers for it. Only the summed dimension shrinks, so that the plan's
    blocks and chunks hold for both.

    >>> tile_shape(torch.float32, False, True), tile_shape(torch.bfloat16, True, False)
    ((16, 128), (32, 32))
    """
    if channels_last:
        columns = LINE_BYTES // dtype.itemsize
        return STEP // columns, columns if aligned else columns // 2
    return STEP // TILE_COLUMNS // (1 if aligned else 2), TILE_COLUMNS


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def prefix_sums(counts: Sequence[int]) -> tuple[int, ...]:
    """Running totals.

    >>> prefix_sums([3, 1, 2])
    (3, 4, 6)
    """
    return tuple(sum(counts[: index + 1]) for index in range(len(counts)))


def plan_tiles(features: Sequence[Geometry]) -> TilePlan:
    """Cut all features into tiles of similar size, the largest features first.

    Channels-first: a tile is 128 columns of some rows (channels). Channels-last: 64 rows (positions) of some
    columns (channels). Either way a program sums one chunk of channels and writes one partial map of its positions.
    """
    total = sum(g.samples * g.channels * g.positions * g.dtype.itemsize for g in features)
    tile_bytes = min(max(total // PROGRAMS, SMALLEST_TILE), LARGEST_TILE)
    members: dict[tuple[torch.dtype, bool, bool], list[tuple[int, int, tuple[int, ...]]]] = {}
    places, partials = [], 0
    for index, g in enumerate(features):
        rows, columns = g.matrix
        tile_rows, tile_columns = tile_shape(g.dtype, g.channels_last, True)
        if g.channels_last:
            summed, step, blocks = columns, tile_columns, _ceil_div(rows, tile_rows)
        else:
            summed, step, blocks = rows, tile_rows, _ceil_div(columns, tile_columns)
        steps = _ceil_div(summed, step)
        chunks = min(_ceil_div(steps * STEP * g.dtype.itemsize, tile_bytes), MOST_CHUNKS)
        chunk = _ceil_div(steps, chunks) * step
        chunks = _ceil_div(summed, chunk)
        row = (g.sample_stride, rows, columns, chunk, chunks, blocks, g.positions, partials)
        members.setdefault((g.dtype, g.channels_last, g.wide), []).append((index, g.samples * chunks * blocks, row))
        places.append(MapPlace(partials, chunks * g.fold))
        partials += g.samples * chunks * g.fold * g.positions
    groups = []
    for (dtype, channels_last, wide), rows_of in members.items():
        ordered = sorted(rows_of, key=lambda entry: -features[entry[0]].positions)
        ends = prefix_sums([programs for _, programs, _ in ordered])
        indices, table = tuple(index for index, _, _ in ordered), tuple(row for _, _, row in ordered)
        groups.append(TileGroup(dtype, channels_last, wide, indices, table, ends))
    return TilePlan(tuple(groups), tuple(places), partials)


def block_of(positions: Sequence[int]) -> tuple[int, int, bool]:
    """For the largest of these maps: positions a program holds, its warps, whether some map is larger than that.

    >>> block_of([49, 196]), block_of([3136]), block_of([50176])
    ((256, 1, False), (4096, 8, False), (1024, 4, True))
    """
    largest = max(positions)
    for block, warps in BLOCKS:
        if largest <= block:
            return block, warps, False
    return *LOOPING_BLOCK, True


@dataclass(frozen=True)
class ResizePlan:
    """The maps whose size changes."""

    features: tuple[int, ...]
    """Which features they belong to."""
    table: tuple[tuple[int, ...], ...]
    """Per row: partials' offset and number, own sizes, new sizes, offset of the resized map."""
    ends: tuple[int, ...]
    backward_ends: tuple[int, ...]
    places: tuple[MapPlace, ...]
    """Where the maps of all features lie afterwards; a resized map is its own only partial."""
    length: int
    """Length of the buffer that holds partial and resized maps."""


def cube(sizes: Sequence[int]) -> tuple[int, ...]:
    """Spatial sizes with leading ones, three in all."""
    return (1,) * (3 - len(sizes)) + tuple(sizes)


def plan_resize(features: Sequence[Geometry], tiles: TilePlan, sizes: Sequence[Sequence[int]]) -> ResizePlan:
    """Put the resized maps behind the partial ones."""
    changed, table, ends, backward_ends, places, length = [], [], [], [], list(tiles.places), tiles.partials
    for index, (g, size) in enumerate(zip(features, sizes, strict=True)):
        if g.spatial != tuple(size):
            place, positions = places[index], math.prod(size)
            changed.append(index)
            table.append((place.offset, place.partials, *cube(g.spatial), *cube(size), length))
            ends.append(g.samples * _ceil_div(positions, RESIZE_BLOCK))
            backward_ends.append(g.samples * _ceil_div(g.positions, RESIZE_BLOCK))
            places[index] = MapPlace(length, 1)
            length += g.samples * positions
    return ResizePlan(
        tuple(changed), tuple(table), prefix_sums(ends), prefix_sums(backward_ends), tuple(places), length
    )


@dataclass(frozen=True)
class MapPlan:
    """The second stage: one program for each map of each layer."""

    table: tuple[tuple[int, ...], ...]
    ends: tuple[int, ...]
    block: int
    warps: int
    more: bool


def split_sizes(features: Sequence[Geometry], sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """The sizes of each layer from the flat list of all.

    Raises:
        ValueError: the list is too short or too long.
    """
    ranks = [len(g.spatial) for g in features]
    if len(sizes) != sum(ranks):
        raise ValueError(f"{len(sizes)} sizes for features with {ranks} spatial dimensions; expected {sum(ranks)}")
    ends = prefix_sums(ranks)
    return [tuple(sizes[end - rank : end]) for end, rank in zip(ends, ranks, strict=True)]


def plan_maps(features: Sequence[Geometry], places: Sequence[MapPlace], sizes: Sequence[Sequence[int]]) -> MapPlan:
    """Per layer: partials' offset and number, positions of the map."""
    table = [(place.offset, place.partials, math.prod(size)) for place, size in zip(places, sizes, strict=True)]
    block = block_of([positions for _, _, positions in table])
    return MapPlan(tuple(table), prefix_sums([g.samples for g in features]), *block)


@dataclass(frozen=True)
class DivergencePlan(MapPlan):
    """The second stage of the divergence."""

    counts: tuple[int, ...]
    """Distances of each layer: samples, or samples times query rows."""


def common_sizes(student: Sequence[Geometry], teacher: Sequence[Geometry]) -> list[tuple[int, ...]]:
    """The smaller of both nets' map sizes, layer by layer and dimension by dimension."""
    return [
        tuple(min(n) for n in zip(s.spatial, t.spatial, strict=True)) for s, t in zip(student, teacher, strict=True)
    ]


def plan_divergence(
    student: Sequence[Geometry], teacher: Sequence[Geometry], places: Sequence[MapPlace], source: str
) -> DivergencePlan:
    """Per layer, in the order in which attention_divergence_fwd reads its fields.

    Student partials' offset and number, the teacher's, positions of one map, maps a sample, heads of the student, of
    the teacher, first distance, number of distances. ``places`` holds the student's first, then the teacher's. With
    probabilities every query row is a map, and heads matter since the mean over heads decides whether it is empty.
    """
    sizes = common_sizes(student, teacher)
    table, counts, first = [], [], 0
    for layer, (s, t, size) in enumerate(zip(student, teacher, sizes, strict=True)):
        place_S, place_T = places[layer], places[len(student) + layer]
        maps, heads = (size[0], (s.channels, t.channels)) if source == "probabilities" else (1, (1, 1))
        counts.append(s.samples * maps)
        both = (place_S.offset, place_S.partials, place_T.offset, place_T.partials)
        table.append((*both, math.prod(size) // maps, maps, *heads, first, counts[-1]))
        first += counts[-1]
    block = block_of([row[4] for row in table])
    return DivergencePlan(tuple(table), prefix_sums(counts), *block, tuple(counts))
