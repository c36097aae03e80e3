r"""Four sums over each pair of derivatives, the distance formed from them, and the gradients.

Legend: ``L`` layers; ``a`` and ``b`` the derivatives of student and teacher, of equal shapes.

Forward, over all layers at once, one read of each element:

    aa = Σ a²,   bb = Σ b²,   ab = Σ a·b,   dd = Σ (a − b)²

A program sums one chunk of one layer in float32, a second kernel adds the chunks of each layer in float64 (see
chunks.py) and forms the distance (see jacobian_distance.py). Backward, with g the gradients of the four sums:

    da = 2·g_aa·a + g_ab·b + 2·g_dd·(a − b),    db = 2·g_bb·b + g_ab·a − 2·g_dd·(a − b)

The sums do not mind in which order elements are read, so any dense memory order that both tensors share will do.
The aligned variants need 16-byte aligned pointers, and nothing of the sizes: a chunk ends with a narrow read of what
does not fill a vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lwkd.kernels.chunks import ChunkGroup, ChunkPlan, own_chunk, plan_chunks, sum_partials
from lwkd.kernels.dtypes import check_dtypes
from lwkd.kernels.jacobian_distance import check_kind, jacobian_distance
from lwkd.kernels.launch import ELEMENTS, launch, on_device, read_address

CHUNK = 8192
"""Elements of each tensor that one program reads."""

STEP = 1024
"""Elements it reads at a time: eight a thread and tensor, which with four sums keeps the registers few."""

LAYER_BLOCK = 256
"""Partials of a layer that are added at once."""


@triton.jit
def _extent(elements, chunk, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr):
    """Elements of this chunk, and how many of them are read in the loop: whole vectors where those are wide."""
    count = tl.minimum(elements - chunk * CHUNK, CHUNK).to(tl.int32)
    vectors = count
    if ALIGNED:
        vector: tl.constexpr = 128 // ELEMENT.primitive_bitwidth
        vectors = tl.multiple_of(count // vector * vector, vector)
    return count, vectors


@triton.jit
def _products(a_ptr, b_ptr, index, end):
    """The terms of the four sums at some elements."""
    x = tl.load(a_ptr + index, mask=index < end, other=0.0).to(tl.float32)
    y = tl.load(b_ptr + index, mask=index < end, other=0.0).to(tl.float32)
    gap = x - y
    return x * x, y * y, x * y, gap * gap


@triton.jit
def jacobian_sums_fwd(
    addresses_ptr,  # int64 (rows, 2): a, b
    table_ptr,  # int64 (rows, CHUNK_FIELDS), see chunks.ChunkGroup; as ends_ptr
    ends_ptr,
    partials_ptr,  # float32 (chunks, 4)
    n_rows,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    """The four sums of every chunk of the pairs of one dtype."""
    row, chunk, elements, _, partial = own_chunk(table_ptr, ends_ptr, n_rows)
    count, vectors = _extent(elements, chunk, ELEMENT, ALIGNED, CHUNK)
    a_ptr = read_address(addresses_ptr + row * 2, ELEMENT, ALIGNED) + chunk * CHUNK
    b_ptr = read_address(addresses_ptr + row * 2 + 1, ELEMENT, ALIGNED) + chunk * CHUNK
    sum_aa = tl.zeros((STEP,), tl.float32)
    sum_bb = tl.zeros((STEP,), tl.float32)
    sum_ab = tl.zeros((STEP,), tl.float32)
    sum_dd = tl.zeros((STEP,), tl.float32)
    for start in tl.range(0, vectors, STEP):
        aa, bb, ab, dd = _products(a_ptr, b_ptr, start + tl.arange(0, STEP), vectors)
        sum_aa += aa
        sum_bb += bb
        sum_ab += ab
        sum_dd += dd
    total_aa, total_bb, total_ab, total_dd = tl.sum(sum_aa), tl.sum(sum_bb), tl.sum(sum_ab), tl.sum(sum_dd)
    if vectors < count:
        rest = vectors + tl.arange(0, 128 // ELEMENT.primitive_bitwidth)
        aa, bb, ab, dd = _products(a_ptr, b_ptr, rest, count)
        total_aa += tl.sum(aa)
        total_bb += tl.sum(bb)
        total_ab += tl.sum(ab)
        total_dd += tl.sum(dd)
    partials_ptr += partial * 4
    tl.store(partials_ptr, total_aa)
    tl.store(partials_ptr + 1, total_bb)
    tl.store(partials_ptr + 2, total_ab)
    tl.store(partials_ptr + 3, total_dd)


@triton.jit
def jacobian_layers_fwd(
    partials_ptr,  # float32 (chunks, 4)
    layers_ptr,  # int64 (L, 2), see chunks.ChunkPlan
    sums_ptr,  # (L, 4): float32, or float64 beside distances
    distances_ptr,  # float32 (L), or None
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program adds up one layer, and forms its distance."""
    layer = tl.program_id(0)
    column = tl.arange(0, 4)
    sums = sum_partials(partials_ptr, layers_ptr, layer, 4, BLOCK)
    tl.store(sums_ptr + layer * 4 + column, sums.to(sums_ptr.dtype.element_ty))
    if distances_ptr is not None:
        aa, bb = tl.sum(tl.where(column == 0, sums, 0.0)), tl.sum(tl.where(column == 1, sums, 0.0))
        ab, dd = tl.sum(tl.where(column == 2, sums, 0.0)), tl.sum(tl.where(column == 3, sums, 0.0))
        tl.store(distances_ptr + layer, jacobian_distance(aa, bb, ab, dd, KIND))


@triton.jit
def _differentiate(
    a_ptr, b_ptr, grad_a_ptr, grad_b_ptr, index, end, grad_aa, grad_bb, grad_ab, grad_dd, ELEMENT: tl.constexpr
):
    """Write both gradients at some elements."""
    x = tl.load(a_ptr + index, mask=index < end, other=0.0).to(tl.float32)
    y = tl.load(b_ptr + index, mask=index < end, other=0.0).to(tl.float32)
    apart = 2 * grad_dd * (x - y)
    tl.store(grad_a_ptr + index, (2 * grad_aa * x + grad_ab * y + apart).to(ELEMENT), mask=index < end)
    tl.store(grad_b_ptr + index, (2 * grad_bb * y + grad_ab * x - apart).to(ELEMENT), mask=index < end)


@triton.jit
def jacobian_sums_bwd(
    addresses_ptr,  # int64 (rows, 4): a, b and their gradients, dense in the same memory order
    table_ptr,
    ends_ptr,
    grad_ptr,  # float32 (L, 4)
    n_rows,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Gradients of the pairs of one dtype."""
    row, chunk, elements, layer, _ = own_chunk(table_ptr, ends_ptr, n_rows)
    count, vectors = _extent(elements, chunk, ELEMENT, ALIGNED, CHUNK)
    addresses_ptr += row * 4
    a_ptr = read_address(addresses_ptr, ELEMENT, ALIGNED) + chunk * CHUNK
    b_ptr = read_address(addresses_ptr + 1, ELEMENT, ALIGNED) + chunk * CHUNK
    grad_a_ptr = read_address(addresses_ptr + 2, ELEMENT, ALIGNED) + chunk * CHUNK
    grad_b_ptr = read_address(addresses_ptr + 3, ELEMENT, ALIGNED) + chunk * CHUNK
    grad_ptr += layer * 4
    g_aa, g_bb = tl.load(grad_ptr), tl.load(grad_ptr + 1)
    g_ab, g_dd = tl.load(grad_ptr + 2), tl.load(grad_ptr + 3)
    for start in tl.range(0, vectors, STEP):
        index = start + tl.arange(0, STEP)
        _differentiate(a_ptr, b_ptr, grad_a_ptr, grad_b_ptr, index, vectors, g_aa, g_bb, g_ab, g_dd, ELEMENT)
    if vectors < count:
        rest = vectors + tl.arange(0, 128 // ELEMENT.primitive_bitwidth)
        _differentiate(a_ptr, b_ptr, grad_a_ptr, grad_b_ptr, rest, count, g_aa, g_bb, g_ab, g_dd, ELEMENT)


def _strides(tensor: Tensor) -> list[tuple[int, int]]:
    """Stride and size of the dimensions whose stride matters."""
    return [(stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without a gap or an overlap, in whatever order.

    >>> is_dense(torch.zeros(2, 3).t()), is_dense(torch.zeros(2, 4)[:, :3]), is_dense(torch.zeros(1).expand(3))
    (True, False, False)
    """
    expected = 1
    for stride, size in sorted(_strides(tensor)):
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def _in_order_of(model: Tensor, tensor: Tensor) -> Tensor:
    return torch.empty_like(model).copy_(tensor)


def _matched(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Both derivatives of each layer as the kernels read them: of one dtype, dense, in one memory order.

    One side is copied to the other's memory order, or to the wider dtype, and both only where neither is dense.
    """
    check_dtypes(a, "the student's derivative of layer")
    check_dtypes(b, "the teacher's derivative of layer")
    pairs = []
    for one, other in zip(a, b, strict=True):
        dtype = torch.promote_types(one.dtype, other.dtype)
        one, other = one.to(dtype), other.to(dtype)
        if not is_dense(one):
            one = _in_order_of(other, one) if is_dense(other) else one.contiguous()
        if not is_dense(other) or _strides(one) != _strides(other):
            other = _in_order_of(one, other)
        pairs.append((one, other))
    return [one for one, _ in pairs], [other for _, other in pairs]


def _plan(tensors: Sequence[Tensor]) -> ChunkPlan:
    elements = [tensor.numel() for tensor in tensors]
    chunks = [triton.cdiv(count, CHUNK) for count in elements]
    return plan_chunks([tensor.dtype for tensor in tensors], elements, chunks, range(len(tensors)), len(tensors))


def _launch_chunks(kernel, group: ChunkGroup, operands: Sequence[Sequence[Tensor]], buffer: Tensor) -> None:
    addresses = [[tensors[layer].data_ptr() for tensors in operands] for layer in group.tensors]
    launch(
        kernel,
        group.ends[-1],
        buffer.device,
        on_device(addresses, buffer.device),
        on_device(group.table, buffer.device),
        on_device(group.ends, buffer.device),
        buffer,
        len(group.tensors),
        ELEMENT=ELEMENTS[group.dtype],
        ALIGNED=all(address % 16 == 0 for row in addresses for address in row),
        CHUNK=CHUNK,
        STEP=STEP,
    )


def _sums(a: Sequence[Tensor], b: Sequence[Tensor], kind: str | None) -> tuple[Tensor, Tensor | None]:
    a, b = _matched(a, b)
    plan, device = _plan(a), a[0].device
    partials = torch.empty(plan.partials, 4, dtype=torch.float32, device=device)
    for group in plan.groups:
        _launch_chunks(jacobian_sums_fwd, group, [a, b], partials)
    # Backward of the distance forms differences of the sums once more, hence float64.
    sums = torch.empty(len(a), 4, dtype=torch.float32 if kind is None else torch.float64, device=device)
    distances = None if kind is None else torch.empty(len(a), dtype=torch.float32, device=device)
    layers = on_device(plan.layers, device)
    launch(
        jacobian_layers_fwd, len(a), device, partials, layers, sums, distances, KIND=kind or "none", BLOCK=LAYER_BLOCK
    )
    return sums, distances


def jacobian_sums(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Launch the op ``lwkd::jacobian_sums``: aa, bb, ab, dd of every layer, ``(L, 4)`` float32.

    Formulas at the head of this file and in :func:`lwkd.reference.jacobian_sums`. Two launches however many layers
    (the first once for every dtype). Pairs of one dtype that are dense in the same memory order are read in place;
    else one side is copied.

    Raises:
        TypeError: a dtype that the kernels do not read.
    """
    return _sums(a, b, None)[0]


def jacobian_sums_backward(grad: Tensor, a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Launch the op ``lwkd::jacobian_sums_backward``: gradients of a and of b, in their dtypes and memory order.

    One launch for every dtype. ``grad`` is ``(L, 4)``, read in float32. Where a side was copied to be read, so is its
    gradient to be returned.

    Raises:
        TypeError: a dtype that the kernels do not read.
    """
    read = _matched(a, b)
    written = [
        [torch.empty(t.numel(), dtype=t.dtype, device=t.device).as_strided(t.shape, t.stride()) for t in side]
        for side in read
    ]
    grad = grad.float().contiguous()
    for group in _plan(read[0]).groups:
        _launch_chunks(jacobian_sums_bwd, group, [*read, *written], grad)
    finished = [
        [
            gradient
            if t.dtype == gradient.dtype and is_dense(t) and t.stride() == gradient.stride()
            else _in_order_of(t, gradient)
            for t, gradient in zip(side, gradients, strict=True)
        ]
        for side, gradients in zip((a, b), written, strict=True)
    ]
    return finished[0], finished[1]


def jacobian_divergence(student: Sequence[Tensor], teacher: Sequence[Tensor], kind: str) -> tuple[Tensor, Tensor]:
    """Launch the op ``lwkd::jacobian_divergence``: distances ``(L,)`` float32, sums ``(L, 4)`` float64.

    As :func:`jacobian_sums`, in the same launches; the distance as in :func:`lwkd.reference.jacobian_distance`.

    Raises:
        TypeError: a dtype that the kernels do not read.
        ValueError: a kind that is not known.
    """
    check_kind(kind)
    sums, distances = _sums(student, teacher, kind)
    return distances, sums
