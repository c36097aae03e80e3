r"""Random signs for Hutchinson's trace estimator, and the traces, for which the signs are made again.

Legend: ``L`` layers; ``i`` a tensor, ``e`` an element's row-major index in it; ``K`` = 512; ``v`` the probe.

    v_ie = 1 − 2·bit(s mod 32) of word ⌊s/32⌋ of philox4x32-10(seed; tile·K + j, i, 0, 0),    τ_l = Σ_i Σ_e v_ie·(Hv)_ie
    tile = ⌊e/128K⌋,    plane s = ⌊(e mod 128K)/K⌋,    column j = e mod K

A program is one warp and has all 128 planes of some columns of one tile: one call of Philox, kept in the registers of
the thread that has the column, serves its 128 elements, and what is read or written of a plane is contiguous. (With
more warps a program, each would make the same words again.) Full planes come several at a time, in vectors whatever
the size of the tensor; the one plane in which the tensor ends comes last, and is all that a small tensor has. Sums are
float32 within a program; a second kernel adds them in float64, in a fixed order (see chunks.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lwkd.kernels.chunks import ChunkPlan, own_chunk, plan_chunks, sum_partials
from lwkd.kernels.dtypes import check_dtypes
from lwkd.kernels.launch import ELEMENTS, launch, on_device, read_address

PLANE = tl.constexpr(512)
"""K: elements in one bit plane."""

PLANES = tl.constexpr(128)
"""Bits that one call of Philox gives."""

WIDTH_BYTES = 512
"""Bytes of one plane that a program reads: 16 for each thread of its warp."""

STEP_ELEMENTS = 2048
"""Elements that a program reads at a time."""

LAYER_BLOCK = 1024
"""Partials of a layer that are added at once."""


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
    table_ptr,  # int64 (rows, CHUNK_FIELDS), see chunks.ChunkGroup; as ends_ptr
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
    table_ptr,  # int64 (rows, CHUNK_FIELDS), see chunks.ChunkGroup; as ends_ptr
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
    layers_ptr,  # int64 (L, 2), see chunks.ChunkPlan
    traces_ptr,  # float32 (L)
    BLOCK: tl.constexpr,
):
    """One program adds up one layer; a layer without a tensor has trace 0."""
    layer = tl.program_id(0)
    trace = sum_partials(partials_ptr, layers_ptr, layer, 1, BLOCK)
    tl.store(traces_ptr + layer + tl.arange(0, 1), trace.to(tl.float32))


def part_shape(dtype: torch.dtype, aligned: bool) -> tuple[int, int]:
    """Columns of a program, and the planes it reads at a time, which come from one word and so must divide 32.

    Narrow loads need more registers, hence half as many planes.

    >>> part_shape(torch.float32, True), part_shape(torch.bfloat16, False)
    ((128, 16), (256, 4))
    """
    columns = WIDTH_BYTES // dtype.itemsize
    return columns, STEP_ELEMENTS // columns // (1 if aligned else 2)


def chunks_of(elements: int, columns: int) -> int:
    """Programs for one tensor: each tile has K / columns of them, a last one that is less than a plane fewer.

    >>> chunks_of(0, 128), chunks_of(129, 128), chunks_of(512, 128), chunks_of(128 * 512 + 1, 128)
    (0, 2, 4, 5)
    """
    tiles, rest = divmod(elements, PLANES.value * PLANE.value)
    return tiles * (PLANE.value // columns) + triton.cdiv(min(rest, PLANE.value), columns)


def _plan(tensors: Sequence[Tensor], layer_of: Sequence[int], layers: int) -> ChunkPlan:
    elements = [tensor.numel() for tensor in tensors]
    chunks = [chunks_of(t.numel(), part_shape(t.dtype, True)[0]) for t in tensors]
    return plan_chunks([tensor.dtype for tensor in tensors], elements, chunks, layer_of, layers)


def _options(dtype: torch.dtype, aligned: bool) -> dict:
    columns, step = part_shape(dtype, aligned)
    return {"ELEMENT": ELEMENTS[dtype], "COLUMNS": columns, "STEP": step, "num_warps": 1}


def rademacher(like: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Launch the op ``lwkd::rademacher``: random signs in the shapes and dtypes of ``like``, contiguous.

    Bitwise equal to :func:`lwkd.reference.rademacher`. One launch for every dtype.

    Raises:
        TypeError: a dtype that the kernels do not write.
    """
    check_dtypes(like, "the probe of tensor")
    probes = [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in like]
    for group in _plan(probes, range(len(probes)), len(probes)).groups:
        device = probes[group.tensors[0]].device
        launch(
            hutchinson_rademacher_fwd,
            group.ends[-1],
            device,
            on_device([probes[index].data_ptr() for index in group.tensors], device),
            on_device(group.table, device),
            on_device(group.ends, device),
            seed,
            len(group.tensors),
            **_options(group.dtype, True),
        )
    return probes


def hutchinson_trace(products: Sequence[Tensor], layer_of: Sequence[int], seed: int, layers: int) -> Tensor:
    """Launch the op ``lwkd::hutchinson_trace``: the trace of every layer for one probe, ``(L,)`` float32.

    As :func:`lwkd.reference.hutchinson_trace`. Two launches however many tensors (the first once for every dtype);
    the probe is not read. Products that are not contiguous are copied, since the signs follow the row-major order.

    Raises:
        TypeError: a dtype that the kernels do not read.
    """
    check_dtypes(products, "the product of tensor")
    products = [product.contiguous() for product in products]
    plan, device = _plan(products, layer_of, layers), products[0].device
    partials = torch.empty(plan.partials, dtype=torch.float32, device=device)
    for group in plan.groups:
        addresses = [products[index].data_ptr() for index in group.tensors]
        aligned = all(address % 16 == 0 for address in addresses)
        launch(
            hutchinson_trace_fwd,
            group.ends[-1],
            device,
            on_device(addresses, device),
            on_device(group.table, device),
            on_device(group.ends, device),
            partials,
            seed,
            len(group.tensors),
            ALIGNED=aligned,
            **_options(group.dtype, aligned),
        )
    traces = torch.empty(layers, dtype=torch.float32, device=device)
    layer_table = on_device(plan.layers, device)
    launch(hutchinson_layers_fwd, layers, device, partials, layer_table, traces, BLOCK=LAYER_BLOCK)
    return traces
