r"""From statistics to learning-rate multipliers: one program for all layers.

    average ← μ·average + (1−μ)·statistics (the first measurement starts it),  e = divergence(average)
    relative: m = clamp((e/mean e)^γ),  decay: m = clamp((e/e(0))^γ), 0/0 = 1,  constant: m unchanged
    local: m = clamp((c/c_L)^(γλ) (1 + (largest−1)·λ·(c−c_before)/c_L)),  λ = max(0, 1 − contrast·c_1/c_L)

    attention: e = the statistic,  hessian: e = |h_S − h_T| / (|h_S| + |h_T|), 0/0 = 0,
    direction, norm, relative: e from the four sums of the Jacobian, see jacobian_distance.py

Legend: ``L`` layers, ``S`` statistics a layer; ``h`` the mean curvature of student and teacher; ``c`` the largest ``e``
up to a layer.

The host reads nothing back: whether a measurement is usable (finite, not all zero) and whether the gradient step was
infinite is decided here, and what must not change is copied to the new state.
"""

import triton
import triton.language as tl

from lwkd.kernels.jacobian_distance import jacobian_distance


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _to_power(x, gamma):
    """x^gamma for x ≥ 0, with 0^0 = inf^0 = 1."""
    ordinary = (x > 0) & (x < float("inf"))
    raised = tl.exp2(gamma * tl.log2(tl.where(ordinary, x, 1.0)))
    grown = tl.where(x == 0, gamma < 0, gamma > 0)
    limit = tl.where(gamma == 0, 1.0, tl.where(grown, float("inf"), 0.0))
    return tl.where(ordinary, raised, limit)


@triton.jit
def _averaged(new_ptr, past_ptr, index, valid, first, momentum):
    """One statistic of every layer: its past average, and its average with the new measurement."""
    new = tl.load(new_ptr + index, mask=valid, other=0.0)
    past = tl.load(past_ptr + index, mask=valid, other=0.0)
    return past, tl.where(first, new, momentum * past + (1 - momentum) * new)


@triton.jit
def _curvature_distance(h_S, h_T):
    """As :func:`lwkd.reference.curvature_distance`, computed in float64."""
    h_S, h_T = h_S.to(tl.float64), h_T.to(tl.float64)
    none = (h_S == 0) & (h_T == 0)
    whole = tl.where(none, 1.0, tl.abs(h_S) + tl.abs(h_T))
    return tl.where(none, 0.0, tl.abs(h_S - h_T) / whole).to(tl.float32)


@triton.jit
def _larger(up_to_a, before_a, up_to_b, before_b):
    """Two neighbouring runs of layers as one: the largest divergence up to its last layer, and up to the one before."""
    return tl.maximum(up_to_a, up_to_b), tl.maximum(up_to_a, before_b)


@triton.jit
def _local(e, layer, gamma, largest, contrast):
    """Multipliers of the rule ``local``, not clamped; ``e`` is 0 behind the last layer."""
    most = tl.max(e)
    share = e / tl.where(most == 0, 1.0, most)
    up_to, before = tl.associative_scan((share, tl.zeros_like(share)), 0, _larger)
    strength = tl.maximum(1 - contrast * tl.sum(tl.where(layer == 0, share, 0.0)), 0.0)
    return _to_power(up_to, gamma * strength) * (1 + (largest - 1) * strength * (up_to - before))


@triton.jit
def rates_update_fwd(
    average_ptr,  # float32 (L, STATISTICS)
    baseline_ptr,  # float32 (L), as divergences and multipliers
    divergences_ptr,
    multipliers_ptr,
    counts_ptr,  # int64 (2): measured, skipped
    statistics_ptr,  # float32 (L, STATISTICS)
    found_inf_ptr,  # float32 (1), or None
    new_average_ptr,
    new_baseline_ptr,
    new_divergences_ptr,
    new_multipliers_ptr,
    new_counts_ptr,
    n_layers,
    gamma,
    momentum,
    smallest,
    largest,
    contrast,
    DIVERGENCE: tl.constexpr,
    POLICY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The state after one measurement."""
    layer = tl.arange(0, BLOCK)
    valid = layer < n_layers
    measured = tl.load(counts_ptr)
    skipped = tl.load(counts_ptr + 1)
    first = measured == 0
    masked = False
    if found_inf_ptr is not None:
        masked = tl.load(found_inf_ptr) != 0

    usable = tl.full((), 1, tl.int1)
    for s in tl.static_range(STATISTICS):
        new = tl.load(statistics_ptr + layer * STATISTICS + s, mask=valid, other=0.0)
        usable &= tl.min(_finite(new).to(tl.int32)) == 1
    place = layer * STATISTICS
    _, e = _averaged(statistics_ptr, average_ptr, place, valid, first, momentum)
    if DIVERGENCE == "hessian":
        _, h_T = _averaged(statistics_ptr, average_ptr, place + 1, valid, first, momentum)
        e = _curvature_distance(e, h_T)
    elif DIVERGENCE != "attention":
        _, bb = _averaged(statistics_ptr, average_ptr, place + 1, valid, first, momentum)
        _, ab = _averaged(statistics_ptr, average_ptr, place + 2, valid, first, momentum)
        _, dd = _averaged(statistics_ptr, average_ptr, place + 3, valid, first, momentum)
        e = jacobian_distance(e, bb, ab, dd, DIVERGENCE)
    usable &= tl.min(_finite(e).to(tl.int32)) == 1
    usable &= tl.max((e != 0).to(tl.int32)) == 1
    keep = masked | (usable == 0)

    for s in tl.static_range(STATISTICS):
        past, average = _averaged(statistics_ptr, average_ptr, place + s, valid, first, momentum)
        tl.store(new_average_ptr + place + s, tl.where(keep, past, average), mask=valid)

    old_baseline = tl.load(baseline_ptr + layer, mask=valid, other=0.0)
    old_divergences = tl.load(divergences_ptr + layer, mask=valid, other=0.0)
    old_multipliers = tl.load(multipliers_ptr + layer, mask=valid, other=0.0)
    baseline = tl.where(first, e, old_baseline)
    if POLICY == "constant":
        multipliers = old_multipliers
    else:
        if POLICY == "local":
            multipliers = _local(e, layer, gamma, largest, contrast)
        else:
            whole = tl.sum(e) / n_layers if POLICY == "relative" else baseline
            ratio = tl.where(whole == 0, tl.where(e == 0, 1.0, float("inf")), e / tl.where(whole == 0, 1.0, whole))
            multipliers = _to_power(ratio, gamma)
        multipliers = tl.minimum(tl.maximum(multipliers, smallest), largest)
        if NORMALIZE:
            multipliers *= n_layers / tl.sum(tl.where(valid, multipliers, 0.0))
    tl.store(new_baseline_ptr + layer, tl.where(keep, old_baseline, baseline), mask=valid)
    tl.store(new_divergences_ptr + layer, tl.where(keep, old_divergences, e), mask=valid)
    tl.store(new_multipliers_ptr + layer, tl.where(keep, old_multipliers, multipliers), mask=valid)
    tl.store(new_counts_ptr, measured + (usable & (masked == 0)).to(tl.int64))
    tl.store(new_counts_ptr + 1, skipped + ((usable == 0) & (masked == 0)).to(tl.int64))
