r"""Random signs for Hutchinson's trace estimator, and the traces, for which the signs are regenerated.

Legend: ``L`` layers; ``i`` a tensor, ``e`` an element's row-major index in it; ``K`` = 512; ``v`` the probe.

    v_ie = 1 − 2·bit(s mod 32) of word ⌊s/32⌋ of philox4x32-10(seed; tile·K + j, i, 0, 0),    τ_l = Σ_i Σ_e v_ie·(Hv)_ie
    tile = ⌊e/128K⌋,    plane s = ⌊(e mod 128K)/K⌋,    column j = e mod K

A program is one warp and has all 128 planes of some columns of one tile. One call of Philox, kept in the registers of
the thread that has the column, serves the column's 128 elements, and what is read or written of a plane is contiguous.
(With more warps in a program, each would compute the same words.) Full planes are taken several at a time, in vectors
whatever the size of the tensor; the plane in which the tensor ends is taken last, and is the only one of a small
tensor. Sums are float32 within a program; a second kernel adds them in float64, in a fixed order (see chunks.py).
"""

import triton
import triton.language as tl

from lwkd.kernels.chunks import own_chunk, sum_partials
from lwkd.kernels.rows import read_address

PLANE = tl.constexpr(512)
"""K: elements in one bit plane."""

PLANES = tl.constexpr(128)
"""Bits that one call of Philox gives."""


@triton.jit
def _part(chunk, elements, COLUMNS: tl.constexpr):
    """This program's tile and columns, the tile's elements, and how many of its planes are full."""
    blocks: tl.constexpr = PLANE // COLUMNS
    tile = chunk // blocks
    columns = (chunk % blocks).to(tl.int32) * COLUMNS + tl.arange(0, COLUMNS)
    count = tl.minimum(elements - tile * (PLANES * PLANE), PLANES * PLANE).to(tl.int32)
    return tile, columns, count, count // PLANE


@triton.jit
def _random_words(seed, tensor, tile, columns):
    return tl.philox(seed, tile.to(tl.int32) * PLANE + columns, tensor.to(tl.int32), 0, 0)


@triton.jit
def _word_of(plane, word_0, word_1, word_2, word_3):
    """The word that holds a plane's bits."""
    low, high = tl.where(plane < 32, word_0, word_1), tl.where(plane < 96, word_2, word_3)
    return tl.where(plane < 64, low, high)


@triton.jit
def _times_sign(x, word, plane):
    """``x`` times the sign of its plane: the random bit goes where float32 has its sign, so nothing is rounded."""
    sign = (word << (31 - plane % 32).to(tl.uint32)) & 0x80000000
    return (x.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def hutchinson_rademacher_fwd(
    addresses_ptr,  # int64 (rows): the probe to write
    table_ptr,  # int64 (rows, CHUNK_FIELDS), see csrc/cuda/chunks.cpp; as ends_ptr
    ends_ptr,
    seed: tl.int64,
    n_rows,
    ELEMENT: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Signs of all tensors of one dtype. Probes are fresh memory, hence always aligned."""
    row, chunk, elements, tensor, _ = own_chunk(table_ptr, ends_ptr, n_rows)
    tile, columns, count, full = _part(chunk, elements, COLUMNS)
    probe_ptr = read_address(addresses_ptr + row, ELEMENT, True) + tile * (PLANES * PLANE)
    word_0, word_1, word_2, word_3 = _random_words(seed, tensor, tile, columns)
    for first in tl.range(0, full, STEP):
        plane = (first + tl.arange(0, STEP))[:, None]
        word = _word_of(first, word_0, word_1, word_2, word_3)[None, :]
        sign = _times_sign(tl.full((STEP, COLUMNS), 1.0, tl.float32), word, plane)
        tl.store(probe_ptr + plane * PLANE + columns[None, :], sign.to(ELEMENT), mask=plane < full)
    if full * PLANE < count:
        place = full * PLANE + columns
        word = _word_of(full, word_0, word_1, word_2, word_3)
        sign = _times_sign(tl.full((COLUMNS,), 1.0, tl.float32), word, full)
        tl.store(probe_ptr + place, sign.to(ELEMENT), mask=place < count)


@triton.jit
def hutchinson_trace_fwd(
    addresses_ptr,  # int64 (rows): the Hessian-vector product
    table_ptr,  # int64 (rows, CHUNK_FIELDS), see csrc/cuda/chunks.cpp; as ends_ptr
    ends_ptr,
    partials_ptr,  # float32 (chunks)
    seed: tl.int64,
    n_rows,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Σ v·Hv of every chunk of the tensors of one dtype."""
    row, chunk, elements, tensor, partial = own_chunk(table_ptr, ends_ptr, n_rows)
    tile, columns, count, full = _part(chunk, elements, COLUMNS)
    product_ptr = read_address(addresses_ptr + row, ELEMENT, ALIGNED) + tile * (PLANES * PLANE)
    word_0, word_1, word_2, word_3 = _random_words(seed, tensor, tile, columns)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in tl.range(0, full, STEP):
        plane = (first + tl.arange(0, STEP))[:, None]
        word = _word_of(first, word_0, word_1, word_2, word_3)[None, :]
        x = tl.load(product_ptr + plane * PLANE + columns[None, :], mask=plane < full, other=0.0)
        total += tl.sum(_times_sign(x.to(tl.float32), word, plane), 0)
    trace = tl.sum(total)
    if full * PLANE < count:
        place = full * PLANE + columns
        x = tl.load(product_ptr + place, mask=place < count, other=0.0).to(tl.float32)
        trace += tl.sum(_times_sign(x, _word_of(full, word_0, word_1, word_2, word_3), full))
    tl.store(partials_ptr + partial, trace)


@triton.jit
def hutchinson_layers_fwd(
    partials_ptr,  # float32 (chunks)
    layers_ptr,  # int64 (L, 2): first partial, number of partials
    traces_ptr,  # float32 (L)
    BLOCK: tl.constexpr,
):
    """One program adds up one layer; a layer without a tensor has trace 0."""
    layer = tl.program_id(0)
    trace = sum_partials(partials_ptr, layers_ptr, layer, 1, BLOCK)
    tl.store(traces_ptr + layer + tl.arange(0, 1), trace.to(tl.float32))
