r"""Four sums over each pair of derivatives, the distance formed from them, and the gradients.

Legend: ``L`` layers; ``a`` and ``b`` the derivatives of student and teacher, of equal shapes.

Forward, over all layers at once, one read of each element:

    aa = Σ a²,   bb = Σ b²,   ab = Σ a·b,   dd = Σ (a − b)²

A program sums one chunk of one layer in float32, a second kernel adds the chunks of each layer in float64 (see
chunks.py) and forms the distance (see jacobian_distance.py). Backward, with g the gradients of the four sums:

    da = 2·g_aa·a + g_ab·b + 2·g_dd·(a − b),    db = 2·g_bb·b + g_ab·a − 2·g_dd·(a − b)

The order of the elements does not matter to the sums, so the tensors may be in any dense memory order that both share.
The aligned variants need 16-byte aligned pointers, but take any size: a chunk ends with a narrow read of what does not
fill a vector.
"""

import triton
import triton.language as tl

from lwkd.kernels.chunks import own_chunk, sum_partials
from lwkd.kernels.jacobian_distance import jacobian_distance
from lwkd.kernels.rows import read_address


@triton.jit
def _extent(elements, chunk, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr):
    """Elements of this chunk, and how many of them the loop reads: in the aligned variant only whole vectors."""
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
    table_ptr,  # int64 (rows, CHUNK_FIELDS), see csrc/cuda/chunks.cpp; as ends_ptr
    ends_ptr,
    partials_ptr,  # float32 (chunks, 4)
    n_rows,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
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
    for start in tl.range(0, vectors, STEP, num_stages=STAGES):
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
    layers_ptr,  # int64 (L, 2): first partial, number of partials
    sums_ptr,  # SUMS (L, 4): float32, or float64 beside distances, whose backward forms differences of them
    distances_ptr,  # float32 (L), or None
    SUMS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program adds up one layer, and forms its distance."""
    layer = tl.program_id(0)
    column = tl.arange(0, 4)
    sums = sum_partials(partials_ptr, layers_ptr, layer, 4, BLOCK)
    tl.store(sums_ptr.to(tl.pointer_type(SUMS)) + layer * 4 + column, sums.to(SUMS))
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
    STAGES: tl.constexpr,
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
    for start in tl.range(0, vectors, STEP, num_stages=STAGES):
        index = start + tl.arange(0, STEP)
        _differentiate(a_ptr, b_ptr, grad_a_ptr, grad_b_ptr, index, vectors, g_aa, g_bb, g_ab, g_dd, ELEMENT)
    if vectors < count:
        rest = vectors + tl.arange(0, 128 // ELEMENT.primitive_bitwidth)
        _differentiate(a_ptr, b_ptr, grad_a_ptr, grad_b_ptr, rest, count, g_aa, g_bb, g_ab, g_dd, ELEMENT)
