r"""Tiles of features: partial attention maps, and the gradient of the features.

Legend: ``B C N`` batch, channels, map positions of one feature F; ``p`` the power; ``A`` a map, ``a`` its cotangent.

Forward, over all features of both nets at once, one read of each:

    A_n = Σ_c |F_cn|^p,    Ȧ_n = Σ_c s(F_cn)·Ḟ_cn,    s(x) = p·|x|^(p−1)·sgn x

A program sums the channels of one tile and writes a partial map. The kernel that reads the maps adds the partials up in
a fixed order, so that no atomics are needed and the bits never change. Backward, with a = dL/dA and t = dL/dȦ:

    dF = g·(a_n·s(F) + t_n·s'(F)·Ḟ),    dḞ = g·t_n·s(F),    s'(x) = p·(p−1)·|x|^(p−2)

where g is the incoming gradient of the layer's divergence (1 for maps). Accumulation is float32 throughout.
"""

import triton
import triton.language as tl

from lwkd.kernels.attention_power import power_curvature, power_slope, power_value
from lwkd.kernels.rows import find_row, read_address

TILE_FIELDS = tl.constexpr(8)


@triton.jit
def _divisible(field_ptr, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """A count from the table; in the aligned variant the host has checked that the vector width divides it."""
    count = tl.load(field_ptr)
    if ALIGNED:
        count = tl.multiple_of(count, 128 // ELEMENT.primitive_bitwidth)
    return count


@triton.jit
def _tile(table_ptr, ends_ptr, n_rows, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """Which tile this program has: its row of the table and the row's fields."""
    row, program = find_row(tl.program_id(0), ends_ptr, n_rows)
    fields_ptr = table_ptr + row * TILE_FIELDS
    sample_stride = _divisible(fields_ptr, ELEMENT, ALIGNED)
    height = tl.load(fields_ptr + 1)
    width = _divisible(fields_ptr + 2, ELEMENT, ALIGNED)
    chunk = _divisible(fields_ptr + 3, ELEMENT, ALIGNED)
    n_chunks = tl.load(fields_ptr + 4)
    n_blocks = tl.load(fields_ptr + 5)
    block = program % n_blocks
    part = program // n_blocks % n_chunks
    sample = program // (n_blocks * n_chunks)
    return row, sample, block, part, n_chunks, chunk, height, width, sample_stride


@triton.jit
def _extent(
    block,
    part,
    chunk,
    height,
    width,
    ELEMENT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows and columns of the first step, and the range of the summed dimension."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    if CHANNELS_LAST:
        last = tl.minimum(part * chunk + chunk, width)
        if ALIGNED:
            last = tl.multiple_of(last, 128 // ELEMENT.primitive_bitwidth)
        rows, columns = block * ROWS + rows, columns.to(tl.int64)
    else:
        last = tl.minimum(part * chunk + chunk, height)
        rows, columns = rows.to(tl.int64), block * COLUMNS + columns
    return rows, columns, part * chunk, last


@triton.jit
def _step(start, last, rows, columns, height, width, CHANNELS_LAST: tl.constexpr):
    """Offsets of one step within the sample, and which of them exist."""
    if CHANNELS_LAST:
        columns += start
        valid = (rows < height)[:, None] & (columns < last)[None, :]
    else:
        rows += start
        valid = (rows < last)[:, None] & (columns < width)[None, :]
    return rows[:, None] * width + columns[None, :], valid


@triton.jit
def attention_tiles_fwd(
    addresses_ptr,  # int64 (rows, 1 or 2): feature, tangent
    table_ptr,  # int64 (rows, TILE_FIELDS), see csrc/cuda/attention_tiles.cpp
    ends_ptr,  # int64 (rows)
    partials_ptr,  # float32
    tangent_partials_ptr,  # float32, or None
    n_rows,
    power,
    ELEMENT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    POWER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Partial maps of all features of one dtype and memory order."""
    TANGENT: tl.constexpr = tangent_partials_ptr is not None
    N_ADDRESSES: tl.constexpr = 2 if TANGENT else 1
    STEP: tl.constexpr = COLUMNS if CHANNELS_LAST else ROWS
    AXIS: tl.constexpr = 1 if CHANNELS_LAST else 0
    row, sample, block, part, n_chunks, chunk, height, width, stride = _tile(
        table_ptr, ends_ptr, n_rows, ELEMENT, ALIGNED
    )
    rows, columns, first, last = _extent(
        block, part, chunk, height, width, ELEMENT, CHANNELS_LAST, ALIGNED, ROWS, COLUMNS
    )
    addresses_ptr += row * N_ADDRESSES
    feature_ptr = read_address(addresses_ptr, ELEMENT, ALIGNED) + sample * stride
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if TANGENT:
        tangent_ptr = read_address(addresses_ptr + 1, ELEMENT, ALIGNED) + sample * stride
        moved = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(first, last, STEP, num_stages=STAGES):
        offset, valid = _step(start, last, rows, columns, height, width, CHANNELS_LAST)
        x = tl.load(feature_ptr + offset, mask=valid, other=0.0).to(tl.float32)
        total += power_value(x, power, POWER)
        if TANGENT:
            moved += power_slope(x, power, POWER) * tl.load(tangent_ptr + offset, mask=valid, other=0.0).to(tl.float32)

    kept = height if CHANNELS_LAST else width
    position = rows if CHANNELS_LAST else columns
    place = tl.load(table_ptr + row * TILE_FIELDS + 7) + (sample * n_chunks + part) * kept + position
    tl.store(partials_ptr + place, tl.sum(total, AXIS), mask=position < kept)
    if TANGENT:
        tl.store(tangent_partials_ptr + place, tl.sum(moved, AXIS), mask=position < kept)


@triton.jit
def attention_tiles_bwd(
    addresses_ptr,  # int64 (rows, 3 or 6): feature, cotangent (B, N), gradient; the same three of the tangent
    table_ptr,
    ends_ptr,
    layers_ptr,  # int64 (rows): the layer of each row
    grad_ptr,  # float32 (layers), or None for 1
    n_rows,
    power,
    ELEMENT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    TANGENT: tl.constexpr,
    POWER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of all features of one dtype and memory order, and of their tangents; gradients are dense."""
    N_ADDRESSES: tl.constexpr = 6 if TANGENT else 3
    STEP: tl.constexpr = COLUMNS if CHANNELS_LAST else ROWS
    AXIS: tl.constexpr = 1 if CHANNELS_LAST else 0
    row, sample, block, part, _, chunk, height, width, stride = _tile(table_ptr, ends_ptr, n_rows, ELEMENT, ALIGNED)
    rows, columns, first, last = _extent(
        block, part, chunk, height, width, ELEMENT, CHANNELS_LAST, ALIGNED, ROWS, COLUMNS
    )
    n_positions = tl.load(table_ptr + row * TILE_FIELDS + 6)
    # A folded row holds several channels side by side, each with the same map.
    position = rows if CHANNELS_LAST else columns % n_positions
    inside = rows < height if CHANNELS_LAST else columns < width
    scale = 1.0
    if grad_ptr is not None:
        scale = tl.load(grad_ptr + tl.load(layers_ptr + row))

    addresses_ptr += row * N_ADDRESSES
    feature_ptr = read_address(addresses_ptr, ELEMENT, ALIGNED) + sample * stride
    map_ptr = read_address(addresses_ptr + 1, tl.float32, False) + sample * n_positions
    result_ptr = read_address(addresses_ptr + 2, ELEMENT, ALIGNED) + sample * (height * width)
    cotangent = tl.expand_dims(scale * tl.load(map_ptr + position, mask=inside, other=0.0), AXIS)
    if TANGENT:
        tangent_ptr = read_address(addresses_ptr + 3, ELEMENT, ALIGNED) + sample * stride
        tangent_map_ptr = read_address(addresses_ptr + 4, tl.float32, False) + sample * n_positions
        tangent_result_ptr = read_address(addresses_ptr + 5, ELEMENT, ALIGNED) + sample * (height * width)
        tangent_cotangent = tl.expand_dims(scale * tl.load(tangent_map_ptr + position, mask=inside, other=0.0), AXIS)
    for start in tl.range(first, last, STEP, num_stages=STAGES):
        offset, valid = _step(start, last, rows, columns, height, width, CHANNELS_LAST)
        x = tl.load(feature_ptr + offset, mask=valid, other=0.0).to(tl.float32)
        slope = power_slope(x, power, POWER)
        result = cotangent * slope
        if TANGENT:
            tangent = tl.load(tangent_ptr + offset, mask=valid, other=0.0).to(tl.float32)
            result += tangent_cotangent * power_curvature(x, power, POWER) * tangent
            tl.store(tangent_result_ptr + offset, (tangent_cotangent * slope).to(ELEMENT), mask=valid)
        tl.store(result_ptr + offset, result.to(ELEMENT), mask=valid)


@triton.jit
def read_partials(map_ptr, n_partials, n_positions, position, valid):
    """One sample's map at some positions: the sum of its partial maps, always in the same order."""
    total = tl.zeros(position.shape, tl.float32)
    for partial in tl.range(0, n_partials):
        total += tl.load(map_ptr + partial * n_positions + position, mask=valid, other=0.0)
    return total
