r"""Optimizer steps with a rate for each tensor: SGD and AdamW over all parameters of one dtype, in place.

Legend: ``p`` parameter, ``g`` gradient; ``m`` momentum buffer, or first moment; ``v`` second moment; ``η`` the rate of
a tensor, lr · multiplier of its layer; ``λ`` weight decay; ``t`` the step.

    g ← g/grad_scale,   to maximise g ← −g
    SGD:    g ← g + λp,   m ← μm + (1−τ)g (at first g),   p ← p − η·(m; with Nesterov g + μm; where μ = 0 g)
    AdamW:  p ← p − ηλp,   m ← β₁m + (1−β₁)g,   v ← β₂v + (1−β₂)g²,
            p ← p − η/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε)     (AMSGrad: the largest v so far)

as torch's own fused forms do it: loaded and stored in the parameters' dtype, computed in float32, the gradient written
back where it was unscaled, nothing written where ``found_inf``. What the user has on the device (rates, scale, steps)
is read here and never by the host. Every element is computed on its own, so the bits never change.

A program has one chunk of one tensor. Whether it can take it in vectors, it decides from the addresses: parameters and
states are aligned to 16 bytes, but gradients in a bucket of a data-parallel net need not be. What does not fill a
vector, or is not aligned, goes through a narrow loop. Parameter, gradient and states are dense in the same memory
order, which may be any.
"""

import triton
import triton.language as tl

from lwkd.kernels.rows import find_row, read_address

STEP_FIELDS = tl.constexpr(2)
"""A row of the table has: number of elements; layer, or -1 for none."""

NARROW = tl.constexpr(256)
"""Elements that the narrow loop reads at a time."""


@triton.jit
def _scalar(address, otherwise):
    """A float32 anywhere in device memory; ``otherwise`` where the address is 0."""
    pointer = address.to(tl.int64).to(tl.pointer_type(tl.float32))  # the interpreter takes small numbers for int32
    return tl.load(pointer, mask=address != 0, other=otherwise)


@triton.jit
def _rate(multipliers_ptr, layer, lr_address, lr):
    return _scalar(lr_address, lr) * tl.load(multipliers_ptr + layer, mask=layer >= 0, other=1.0)


@triton.jit
def _gradient_scale(grad_scale_address, maximize):
    """The factor that unscales gradients, whether they are scaled, and the sign by which maximizing ascends."""
    unscale = tl.div_rn(1.0, _scalar(grad_scale_address, 1.0))
    return unscale, grad_scale_address != 0, tl.where(maximize != 0, -1.0, 1.0)


@triton.jit
def _extent(
    addresses_ptr, elements, begin, infinite, ELEMENT: tl.constexpr, OPERANDS: tl.constexpr, CHUNK: tl.constexpr
):
    """Elements of a chunk, and how many of them go in vectors: none if an operand is not aligned.

    Where gradients are infinite, the chunk counts as empty.
    """
    count = tl.where(infinite, 0, tl.minimum(elements - begin, CHUNK)).to(tl.int32)
    bits = tl.load(addresses_ptr)
    for operand in tl.static_range(1, OPERANDS):
        bits |= tl.load(addresses_ptr + operand)
    vector: tl.constexpr = 128 // ELEMENT.primitive_bitwidth
    return count, tl.multiple_of(tl.where(bits % 16 == 0, count // vector * vector, 0), vector)


@triton.jit
def _pointers(addresses_ptr, begin, ELEMENT: tl.constexpr, OPERANDS: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the chunk begins in each operand."""
    pointers = (read_address(addresses_ptr, ELEMENT, ALIGNED) + begin,)
    for operand in tl.static_range(1, OPERANDS):
        pointers += (read_address(addresses_ptr + operand, ELEMENT, ALIGNED) + begin,)
    return pointers


@triton.jit
def _read(pointer, index, end):
    return tl.load(pointer + index, mask=index < end, other=0.0).to(tl.float32)


@triton.jit
def _write(pointer, index, end, value, ELEMENT: tl.constexpr):
    tl.store(pointer + index, value.to(ELEMENT), mask=index < end)


@triton.jit
def _sgd(pointers, index, end, scale, rate, options, flags, ELEMENT: tl.constexpr, MOMENTUM: tl.constexpr):
    """Update some elements. All loads come first: the compiler moves none of them above a store."""
    unscale, scaled, sign = scale
    momentum, dampening, weight_decay = options
    nesterov, first = flags
    p, g = _read(pointers[0], index, end), _read(pointers[1], index, end) * unscale
    if MOMENTUM:
        m = _read(pointers[2], index, tl.where(first != 0, 0, end))
    _write(pointers[1], index, tl.where(scaled, end, 0), g, ELEMENT)
    g *= sign
    g = tl.where(weight_decay != 0, g + weight_decay * p, g)
    if MOMENTUM:
        m = tl.where(first != 0, g, momentum * m + (1 - dampening) * g)
        _write(pointers[2], index, end, m, ELEMENT)
        g = tl.where(nesterov != 0, g + momentum * m, m)
    _write(pointers[0], index, end, p - rate * g, ELEMENT)


@triton.jit
def step_sgd_fwd(
    addresses_ptr,  # int64 (rows, 2 + MOMENTUM): parameter, gradient, momentum buffer
    table_ptr,  # int64 (rows, STEP_FIELDS)
    ends_ptr,  # int64 (rows): chunks up to and with this row
    multipliers_ptr,  # float32 (layers)
    lr_address: tl.int64,  # of a float32; 0: lr is given
    grad_scale_address: tl.int64,  # of a float32, or 0; as found_inf_address
    found_inf_address: tl.int64,
    n_rows,
    lr,
    momentum,
    dampening,
    weight_decay,
    nesterov,  # flags, as are first (the buffers hold nothing yet) and maximize
    first,
    maximize,
    ELEMENT: tl.constexpr,
    MOMENTUM: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    """One step of SGD."""
    operands: tl.constexpr = 2 + MOMENTUM
    row, chunk = find_row(tl.program_id(0), ends_ptr, n_rows)
    elements, layer = tl.load(table_ptr + row * STEP_FIELDS), tl.load(table_ptr + row * STEP_FIELDS + 1)
    addresses_ptr += row * operands
    begin = chunk * CHUNK
    infinite = _scalar(found_inf_address, 0.0) != 0
    count, wide = _extent(addresses_ptr, elements, begin, infinite, ELEMENT, operands, CHUNK)
    rate = _rate(multipliers_ptr, layer, lr_address, lr)
    scale = _gradient_scale(grad_scale_address, maximize)
    options, flags = (momentum, dampening, weight_decay), (nesterov, first)
    pointers = _pointers(addresses_ptr, begin, ELEMENT, operands, True)
    for start in tl.range(0, wide, STEP):
        index = start + tl.arange(0, STEP)
        _sgd(pointers, index, wide, scale, rate, options, flags, ELEMENT, MOMENTUM)
    pointers = _pointers(addresses_ptr, begin, ELEMENT, operands, False)
    for start in tl.range(wide, count, NARROW):
        index = start + tl.arange(0, NARROW)
        _sgd(pointers, index, count, scale, rate, options, flags, ELEMENT, MOMENTUM)


@triton.jit
def _correction(log_beta, step):
    """1 − βᵗ = −expm1(t·ln β); by a series near 0, where the difference would lose float32's digits."""
    x = step * log_beta
    series = 1.0 + x * (1 / 7) * (1.0 + x * (1 / 8))
    series = 1.0 + x * (1 / 5) * (1.0 + x * (1 / 6) * series)
    series = 1.0 + x * (1 / 3) * (1.0 + x * (1 / 4) * series)
    series = x * (1.0 + x * (1 / 2) * series)
    return tl.where(x > -0.5, -series, 1.0 - tl.exp(x))


@triton.jit
def _adamw(pointers, index, end, scale, rates, options, ELEMENT: tl.constexpr, AMSGRAD: tl.constexpr):
    """Update some elements. All loads come first: the compiler moves none of them above a store."""
    unscale, scaled, sign = scale
    decay, step_size, root = rates
    beta1, beta2, eps = options
    p, g = _read(pointers[0], index, end), _read(pointers[1], index, end) * unscale
    m, v = _read(pointers[2], index, end), _read(pointers[3], index, end)
    if AMSGRAD:
        largest = _read(pointers[4], index, end)
    _write(pointers[1], index, tl.where(scaled, end, 0), g, ELEMENT)
    g *= sign
    p = tl.where(decay != 0, p - decay * p, p)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * (g * g)
    _write(pointers[2], index, end, m, ELEMENT)
    _write(pointers[3], index, end, v, ELEMENT)
    if AMSGRAD:
        v = tl.maximum(largest, v)
        _write(pointers[4], index, end, v, ELEMENT)
    _write(pointers[0], index, end, p - step_size * m / (tl.sqrt(v) / root + eps), ELEMENT)


@triton.jit
def step_adamw_fwd(
    addresses_ptr,  # int64 (rows, 5 + AMSGRAD): parameter, gradient, m, v, the largest v, step (float32)
    table_ptr,  # int64 (rows, STEP_FIELDS)
    ends_ptr,  # int64 (rows): chunks up to and with this row
    counters_ptr,  # int32 (rows): programs that have arrived; 0 before and after the launch
    multipliers_ptr,  # float32 (layers)
    lr_address: tl.int64,  # of a float32; 0: lr is given
    grad_scale_address: tl.int64,  # of a float32, or 0; as found_inf_address
    found_inf_address: tl.int64,
    n_rows,
    lr,
    beta1,
    beta2,
    log_beta1,  # ln β, of the β that float32 holds
    log_beta2,
    eps,
    weight_decay,
    maximize,  # flag
    ELEMENT: tl.constexpr,
    AMSGRAD: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    """One step of AdamW. All programs of a tensor read its t; the last one to arrive afterwards increments it."""
    operands: tl.constexpr = 4 + AMSGRAD
    row, chunk = find_row(tl.program_id(0), ends_ptr, n_rows)
    elements, layer = tl.load(table_ptr + row * STEP_FIELDS), tl.load(table_ptr + row * STEP_FIELDS + 1)
    addresses_ptr += row * (operands + 1)
    begin = chunk * CHUNK
    infinite = _scalar(found_inf_address, 0.0) != 0
    count, wide = _extent(addresses_ptr, elements, begin, infinite, ELEMENT, operands, CHUNK)
    step_ptr = tl.load(addresses_ptr + operands).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr) + 1
    rate = _rate(multipliers_ptr, layer, lr_address, lr)
    scale = _gradient_scale(grad_scale_address, maximize)
    root = tl.sqrt(_correction(log_beta2, step))
    rates, options = (rate * weight_decay, rate / _correction(log_beta1, step), root), (beta1, beta2, eps)
    pointers = _pointers(addresses_ptr, begin, ELEMENT, operands, True)
    for start in tl.range(0, wide, STEP):
        index = start + tl.arange(0, STEP)
        _adamw(pointers, index, wide, scale, rates, options, ELEMENT, AMSGRAD)
    pointers = _pointers(addresses_ptr, begin, ELEMENT, operands, False)
    for start in tl.range(wide, count, NARROW):
        index = start + tl.arange(0, NARROW)
        _adamw(pointers, index, count, scale, rates, options, ELEMENT, AMSGRAD)
    # The program may count as arrived only when every one of its warps has read the step.
    tl.debug_barrier()
    n_chunks = tl.maximum((elements + CHUNK - 1) // CHUNK, 1)
    if tl.atomic_add(counters_ptr + row, 1, sem="acq_rel") == n_chunks - 1:
        tl.store(step_ptr, tl.where(infinite, step - 1, step))
        tl.store(counters_ptr + row, 0)
