r"""Attention divergence of all layers, and the factor that its backward needs.

Legend: ``q p`` normalised maps of student and teacher, ``R`` sum of the student's map before normalising,
``m = b1·q + b2·p``, ``x = (q−p)/m``, ``w`` one over the number of a layer's distances.

The textbook difference of entropies loses all digits when the maps are close. With g(u) = (1+u)·log(1+u) − u,

    JSD = Σ m·(b1·g(b2·x) + b2·g(−b1·x))

is the same sum with only positive terms: q = m·(1 + b2·x) and p = m·(1 − b1·x), and the terms linear in x cancel.
Since 1 + b2·x = q/m, the derivative is b1·log(q/m); through the quotient q = r/R the factor of a position is

    jsd: w·(b1·log(q/m) − Σ q·b1·log(q/m))/R
    l2:  w·(2·(s − t)/‖q‖ − d·q/‖q‖²)/R,    s = q/‖q‖, t = p/‖p‖, d = ‖s−t‖²

(for l2 the norm takes off s·(s·(s−t)), and s·(s−t) = d/2). A student map with R < 1e-24 counts as uniform and has
factor 0. Positions with q = 0 have a factor that is finite and meets a slope of 0.

Forward: partial maps of both nets (attention_tiles), distances and factors, mean over the batch; the mean is left out
where every layer has one distance. Backward: one launch. Where sizes differ, two more launches resize the maps and
the factors (attention_resize).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lwkd import reference
from lwkd.kernels.attention_memory import gradients_like, readable
from lwkd.kernels.attention_plan import common_sizes, plan_divergence, plan_resize, plan_tiles
from lwkd.kernels.attention_power import power_code
from lwkd.kernels.attention_resize import resize, resize_backward
from lwkd.kernels.attention_tiles import feature_gradients, partial_maps, read_partials
from lwkd.kernels.launch import find_row, launch, on_device

EMPTY_MAP = tl.constexpr(reference.EMPTY_MAP)
LAYER_FIELDS = tl.constexpr(10)
SERIES_TERMS = tl.constexpr(11)
MEAN_BLOCK = 1024


@triton.jit
def _log_and_excess(u, ratio):
    """``log(1+u)`` and ``g(u)``; ``ratio`` is 1+u, formed where it loses nothing. At ratio 0 the log reads -1."""
    small = tl.abs(u) < 0.25
    v = tl.where(small, u, 0.0)
    series = tl.full(u.shape, 1.0 / (SERIES_TERMS + 1), tl.float32)
    for k in tl.static_range(SERIES_TERMS - 1):
        series = 1.0 / (SERIES_TERMS - k) - v * series
    # log(1+v) = v − v²·series, so g(v) = v²·(1 − series − v·series): nothing cancels.
    positive = ratio > 0
    log_large = tl.where(positive, tl.log(tl.where(positive, ratio, 1.0)), -1.0)
    log = tl.where(small, v - v * v * series, log_large)
    excess = tl.where(small, v * v * (1 - series - v * series), ratio * log_large - u)
    return log, excess


@triton.jit
def _jensen_shannon(q, p, beta_S, beta_T):
    """The summands of the JSD, and log(q/m)."""
    mixture = beta_S * q + beta_T * p
    both_zero = mixture == 0
    safe = tl.where(both_zero, 1.0, mixture)
    x = (q - p) / safe
    log_S, excess_S = _log_and_excess(beta_T * x, q / safe)
    _, excess_T = _log_and_excess(-beta_S * x, p / safe)
    return mixture * (beta_S * excess_S + beta_T * excess_T), log_S


@triton.jit
def _normalised(r, total, empty_sum, n, valid):
    empty = total < empty_sum
    return tl.where(valid, tl.where(empty, 1.0 / n, r / tl.where(empty, 1.0, total)), 0.0)


@triton.jit
def _distance(q, p, scale_S, scale_T, beta_S, beta_T, KIND: tl.constexpr):
    """Of some positions: the distance, its derivative by q (l2: without the norm's), what the quotients take off it."""
    if KIND == "jsd":
        summands, log_S = _jensen_shannon(q, p, beta_S, beta_T)
        distance = tl.sum(summands)
        slope = beta_S * log_S
        inner = tl.sum(q * slope)
    else:
        difference = q * scale_S - p * scale_T
        distance = tl.sum(difference * difference)
        slope = 2.0 * scale_S * difference
        inner = scale_S * scale_S * distance
    return distance, slope, inner


@triton.jit
def attention_divergence_fwd(
    partials_ptr,
    table_ptr,  # int64 (layers, LAYER_FIELDS), see attention_plan.plan_divergence
    ends_ptr,  # int64 (layers)
    distances_ptr,  # float32, one for each program
    addresses_ptr,  # int64 (layers): factors, float32 (B, N) or (B, N, N); or None
    n_layers,
    beta_S,
    beta_T,
    KIND: tl.constexpr,
    MORE: tl.constexpr,  # whether some map is larger than BLOCK
    BLOCK: tl.constexpr,
):
    """One program compares one pair of maps; the first BLOCK positions stay in registers."""
    layer, program = find_row(tl.program_id(0), ends_ptr, n_layers)
    fields_ptr = table_ptr + layer * LAYER_FIELDS
    parts_S, parts_T = tl.load(fields_ptr + 1), tl.load(fields_ptr + 3)
    n = tl.load(fields_ptr + 4)
    n_maps = tl.load(fields_ptr + 5)
    # The threshold holds for the mean over heads, the maps are sums.
    empty_S = EMPTY_MAP * tl.load(fields_ptr + 6).to(tl.float32)
    empty_T = EMPTY_MAP * tl.load(fields_ptr + 7).to(tl.float32)
    sample, first = program // n_maps, program % n_maps * n
    step = n_maps * n
    map_S_ptr = partials_ptr + tl.load(fields_ptr) + sample * parts_S * step + first
    map_T_ptr = partials_ptr + tl.load(fields_ptr + 2) + sample * parts_T * step + first
    cells = tl.arange(0, BLOCK)
    valid = cells < n
    end = n if MORE else 0

    r_S = read_partials(map_S_ptr, parts_S, step, cells, valid)
    r_T = read_partials(map_T_ptr, parts_T, step, cells, valid)
    total_S, total_T = tl.sum(r_S), tl.sum(r_T)
    for start in tl.range(BLOCK, end, BLOCK):
        total_S += tl.sum(read_partials(map_S_ptr, parts_S, step, start + cells, start + cells < n))
        total_T += tl.sum(read_partials(map_T_ptr, parts_T, step, start + cells, start + cells < n))
    q = _normalised(r_S, total_S, empty_S, n, valid)
    p = _normalised(r_T, total_T, empty_T, n, valid)

    scale_S, scale_T = 1.0, 1.0
    if KIND == "l2":
        squares_S, squares_T = tl.sum(q * q), tl.sum(p * p)
        for start in tl.range(BLOCK, end, BLOCK):
            inside = start + cells < n
            more_S = read_partials(map_S_ptr, parts_S, step, start + cells, inside)
            more_T = read_partials(map_T_ptr, parts_T, step, start + cells, inside)
            more_S = _normalised(more_S, total_S, empty_S, n, inside)
            more_T = _normalised(more_T, total_T, empty_T, n, inside)
            squares_S += tl.sum(more_S * more_S)
            squares_T += tl.sum(more_T * more_T)
        scale_S, scale_T = 1.0 / tl.sqrt(squares_S), 1.0 / tl.sqrt(squares_T)

    distance, slope, inner = _distance(q, p, scale_S, scale_T, beta_S, beta_T, KIND)
    for start in tl.range(BLOCK, end, BLOCK):
        inside = start + cells < n
        more_S = read_partials(map_S_ptr, parts_S, step, start + cells, inside)
        more_T = read_partials(map_T_ptr, parts_T, step, start + cells, inside)
        more_S = _normalised(more_S, total_S, empty_S, n, inside)
        more_T = _normalised(more_T, total_T, empty_T, n, inside)
        more, _, more_inner = _distance(more_S, more_T, scale_S, scale_T, beta_S, beta_T, KIND)
        distance += more
        inner += more_inner
    tl.store(distances_ptr + tl.load(fields_ptr + 8) + program, distance)

    if addresses_ptr is not None:
        empty = total_S < empty_S
        outer = tl.where(empty, 0.0, 1.0 / (tl.where(empty, 1.0, total_S) * tl.load(fields_ptr + 9)))
        factors_ptr = tl.load(addresses_ptr + layer).to(tl.pointer_type(tl.float32)) + sample * step + first
        pull = slope - inner * (q if KIND == "l2" else 1.0)
        tl.store(factors_ptr + cells, outer * pull, mask=valid)
        for start in tl.range(BLOCK, end, BLOCK):
            inside = start + cells < n
            more_S = read_partials(map_S_ptr, parts_S, step, start + cells, inside)
            more_T = read_partials(map_T_ptr, parts_T, step, start + cells, inside)
            more_S = _normalised(more_S, total_S, empty_S, n, inside)
            more_T = _normalised(more_T, total_T, empty_T, n, inside)
            _, slope, _ = _distance(more_S, more_T, scale_S, scale_T, beta_S, beta_T, KIND)
            pull = slope - inner * (more_S if KIND == "l2" else 1.0)
            tl.store(factors_ptr + start + cells, outer * pull, mask=inside)


@triton.jit
def attention_mean_fwd(distances_ptr, table_ptr, result_ptr, BLOCK: tl.constexpr):
    """One program averages one layer's distances, always in the same order."""
    layer = tl.program_id(0)
    fields_ptr = table_ptr + layer * LAYER_FIELDS
    distances_ptr += tl.load(fields_ptr + 8)
    count = tl.load(fields_ptr + 9)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(distances_ptr + index, mask=index < count, other=0.0)
    tl.store(result_ptr + layer, tl.sum(total) / count)


def attention_divergence(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    source: str,
    power: float,
    kind: str,
    betas: Sequence[float],
    save_factors: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Launch the op ``lwkd::attention_divergence``: divergence ``(L,)`` float32, and the factors of backward.

    Formulas at the head of this file and in :func:`lwkd.reference.attention_divergence`. A factor, float32 of the
    student's map size, is the derivative of the layer's divergence with respect to the sum over channels (heads).
    Three launches however many layers, two where every layer has one distance, up to two more where sizes differ
    (the first once for every dtype, memory order and divisibility by the vector width among the features).

    Raises:
        TypeError: a dtype that the kernels do not read.
    """
    features_S, geometries_S = readable(student, "the student's feature")
    features_T, geometries_T = readable(teacher, "the teacher's feature")
    geometries = [*geometries_S, *geometries_T]
    tiles = plan_tiles(geometries)
    sizes = common_sizes(geometries_S, geometries_T)
    resizing = plan_resize(geometries, tiles, [*sizes, *sizes])
    plan = plan_divergence(geometries_S, geometries_T, resizing.places, source)
    code = power_code(power, source)
    partials, _ = partial_maps(tiles, resizing.length, [*features_S, *features_T], [], power, code)
    resize(resizing, partials)
    device = student[0].device
    table = on_device(plan.table, device)
    distances = torch.empty(plan.ends[-1], dtype=torch.float32, device=device)
    factors, resized_factors, addresses = [], [], None
    if save_factors:
        for g, size in zip(geometries_S, sizes, strict=True):
            shape = g.spatial if source == "probabilities" else (g.positions,)
            factors.append(torch.empty(g.samples, *shape, device=device))
            same = g.spatial == size
            resized_factors.append(factors[-1] if same else torch.empty(g.samples, math.prod(size), device=device))
        addresses = on_device([factor.data_ptr() for factor in resized_factors], device)
    launch(
        attention_divergence_fwd,
        plan.ends[-1],
        device,
        partials,
        table,
        on_device(plan.ends, device),
        distances,
        addresses,
        len(plan.table),
        float(betas[0]),
        float(betas[1]),
        KIND=kind,
        MORE=plan.more,
        BLOCK=plan.block,
        num_warps=plan.warps,
    )
    if save_factors:
        resize_backward(plan_resize(geometries_S, tiles, sizes), [resized_factors], [factors])
    if all(count == 1 for count in plan.counts):
        return distances, factors
    divergences = torch.empty(len(student), dtype=torch.float32, device=device)
    launch(attention_mean_fwd, len(student), device, distances, table, divergences, BLOCK=MEAN_BLOCK)
    return divergences, factors


def attention_divergence_backward(
    grad: Tensor, student: Sequence[Tensor], factors: Sequence[Tensor], source: str, power: float
) -> list[Tensor]:
    """Launch ``lwkd::attention_divergence_backward``: gradients of the student's features, in their dtypes.

    One launch (for every dtype, memory order and divisibility by the vector width among the features).
    ``grad`` is ``(L,)`` float32.

    Raises:
        TypeError: a dtype that the kernels do not read.
    """
    features, geometries = readable(student, "the student's feature")
    gradients = gradients_like(features, geometries)
    feature_gradients(
        plan_tiles(geometries), [features, factors, gradients], grad.contiguous(), power, power_code(power, source)
    )
    return gradients
