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

Forward, two launches: the first makes partial maps of both nets (attention_tiles). The second makes distances and
factors; of the programs of a layer, the last one to arrive also takes the mean of the layer's distances. Which one that
is depends on chance, but not what it adds up nor in which order. Backward: one launch. Where sizes differ, two more
launches resize the maps and the factors (attention_resize). Large maps take two launches more, l2 three
(attention_split).
"""

import triton
import triton.language as tl

from lwkd.kernels.attention import EMPTY_MAP, divisor
from lwkd.kernels.attention_split import SUMS, own_segment, read_map, read_sum, sum_map, sum_segments
from lwkd.kernels.rows import find_row, read_address

LAYER_FIELDS = tl.constexpr(11)
SERIES_TERMS = tl.constexpr(11)
MEAN_BLOCK = tl.constexpr(1024)


@triton.jit
def _log_and_excess(u, ratio):
    """``log(1+u)`` and ``g(u)``; ``ratio`` is 1+u, formed without cancellation. At ratio 0 the log is given as -1."""
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
    """A map at some positions, 0 outside of it; ``total`` is its sum."""
    empty = total < empty_sum
    return tl.where(valid, tl.where(empty, 1.0 / n, r / divisor(total, empty)), 0.0)


@triton.jit
def _read_normalised(pointers, totals, empty_sums, cells, last, n):
    """Normalised maps of student and teacher at positions that did not stay in registers."""
    valid = cells < last
    q = _normalised(read_sum(pointers[0], cells, valid), totals[0], empty_sums[0], n, valid)
    p = _normalised(read_sum(pointers[1], cells, valid), totals[1], empty_sums[1], n, valid)
    return q, p


@triton.jit
def _distance(q, p, scale_S, scale_T, betas, KIND: tl.constexpr):
    """Of some positions: the distance, its derivative by q (l2: at a fixed norm), what normalising takes off that."""
    if KIND == "jsd":
        summands, log_S = _jensen_shannon(q, p, betas[0], betas[1])
        distance = tl.sum(summands)
        slope = betas[0] * log_S
        inner = tl.sum(q * slope)
    else:
        difference = q * scale_S - p * scale_T
        distance = tl.sum(difference * difference)
        slope = 2.0 * scale_S * difference
        inner = scale_S * scale_S * distance
    return distance, slope, inner


@triton.jit
def _compare(
    pointers,  # of student and teacher, as all pairs here
    parts,  # numbers of partial maps
    betas,
    heads_ptr,  # to the numbers of heads
    step,  # positions of all maps of a sample
    n,
    begin,
    last,
    n_segments,
    own_sums_ptr,  # or None: what the phases leave behind of this segment
    map_sums_ptr,  # or None: the same of the map's first segment
    factors_ptr,  # or None
    n_distances,
    KIND: tl.constexpr,
    PHASE: tl.constexpr,
    MORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One phase of comparing a segment of two maps; the distance of its positions, 0 in phases that find none."""
    distance = tl.zeros((), tl.float32)
    map_S_ptr, map_T_ptr = pointers
    cells = begin + tl.arange(0, BLOCK)
    valid = cells < last
    rest = begin + BLOCK
    end = last if MORE else rest

    if PHASE == "whole" or PHASE == "sums":
        r_S = read_map(map_S_ptr, parts[0], step, begin, last, PHASE, BLOCK)
        r_T = read_map(map_T_ptr, parts[1], step, begin, last, PHASE, BLOCK)
        total_S = sum_map(r_S, map_S_ptr, parts[0], step, begin, last, MORE, BLOCK)
        total_T = sum_map(r_T, map_T_ptr, parts[1], step, begin, last, MORE, BLOCK)
    if PHASE == "sums":
        tl.store(own_sums_ptr, total_S)
        tl.store(own_sums_ptr + 1, total_T)
    else:
        if PHASE != "whole":
            r_S, r_T = read_sum(map_S_ptr, cells, valid), read_sum(map_T_ptr, cells, valid)
            total_S, total_T = sum_segments(map_sums_ptr, n_segments), sum_segments(map_sums_ptr + 1, n_segments)
        elif MORE:
            tl.debug_barrier()  # behind the sums that other threads have written
        # The threshold is for the mean over heads, and these maps are sums over heads.
        heads_S, heads_T = tl.load(heads_ptr).to(tl.float32), tl.load(heads_ptr + 1).to(tl.float32)
        empty_sums = (EMPTY_MAP * heads_S, EMPTY_MAP * heads_T)
        q = _normalised(r_S, total_S, empty_sums[0], n, valid)
        p = _normalised(r_T, total_T, empty_sums[1], n, valid)
        totals = (total_S, total_T)

        scale_S, scale_T = 1.0, 1.0
        if KIND == "l2":
            if PHASE == "whole" or PHASE == "norms":
                squares_S, squares_T = tl.sum(q * q), tl.sum(p * p)
                for start in tl.range(rest, end, BLOCK):
                    more_cells = start + tl.arange(0, BLOCK)
                    more_q, more_p = _read_normalised(pointers, totals, empty_sums, more_cells, last, n)
                    squares_S += tl.sum(more_q * more_q)
                    squares_T += tl.sum(more_p * more_p)
            else:
                squares_S = sum_segments(map_sums_ptr + 2, n_segments)
                squares_T = sum_segments(map_sums_ptr + 3, n_segments)
            scale_S, scale_T = 1.0 / tl.sqrt(squares_S), 1.0 / tl.sqrt(squares_T)
        if PHASE == "norms":
            tl.store(own_sums_ptr + 2, squares_S)
            tl.store(own_sums_ptr + 3, squares_T)
        else:
            distance, slope, inner = _distance(q, p, scale_S, scale_T, betas, KIND)
            if PHASE == "factors":
                inner = sum_segments(map_sums_ptr + 4, n_segments)
            else:
                for start in tl.range(rest, end, BLOCK):
                    more_cells = start + tl.arange(0, BLOCK)
                    more_q, more_p = _read_normalised(pointers, totals, empty_sums, more_cells, last, n)
                    more, _, more_inner = _distance(more_q, more_p, scale_S, scale_T, betas, KIND)
                    distance += more
                    inner += more_inner
            if PHASE == "distances":
                tl.store(own_sums_ptr + 4, inner)

            if factors_ptr is not None:
                empty = total_S < empty_sums[0]
                outer = tl.where(empty, 0.0, 1.0 / (tl.where(empty, 1.0, total_S) * n_distances))
                pull = slope - inner * (q if KIND == "l2" else 1.0)
                tl.store(factors_ptr + cells, outer * pull, mask=valid)
                for start in tl.range(rest, end, BLOCK):
                    more_cells = start + tl.arange(0, BLOCK)
                    more_q, more_p = _read_normalised(pointers, totals, empty_sums, more_cells, last, n)
                    _, slope, _ = _distance(more_q, more_p, scale_S, scale_T, betas, KIND)
                    pull = slope - inner * (more_q if KIND == "l2" else 1.0)
                    tl.store(factors_ptr + more_cells, outer * pull, mask=more_cells < last)
    return distance


@triton.jit
def attention_divergence_fwd(
    partials_ptr,
    table_ptr,  # int64 (layers, LAYER_FIELDS), see csrc/cuda/attention.cpp
    ends_ptr,  # int64 (layers)
    sums_ptr,  # float32 (programs, SUMS), or None: what the phases leave behind
    distances_ptr,  # float32, one for each program
    counters_ptr,  # int32 (layers): programs that have arrived; 0 before and after the launch
    divergences_ptr,  # float32 (layers)
    addresses_ptr,  # int64 (layers): factors, float32 (B, N) or (B, N, N); or None
    n_layers,
    beta_S,
    beta_T,
    KIND: tl.constexpr,
    PHASE: tl.constexpr,  # "whole"; or, of every segment, "sums", for l2 "norms", "distances", and "factors"
    MORE: tl.constexpr,  # whether some program has more than BLOCK positions
    BLOCK: tl.constexpr,
):
    """One program compares one pair of maps, or a segment of it; the first BLOCK positions stay in registers."""
    layer, program = find_row(tl.program_id(0), ends_ptr, n_layers)
    fields_ptr = table_ptr + layer * LAYER_FIELDS
    parts = (tl.load(fields_ptr + 1), tl.load(fields_ptr + 3))
    n = tl.load(fields_ptr + 4)
    n_maps = tl.load(fields_ptr + 5)
    betas = (beta_S, beta_T)
    number, begin, last, n_segments = own_segment(program, n, fields_ptr + 10, PHASE)
    n_distances = tl.load(fields_ptr + 9) // n_segments
    # Divisions of 64 bits are subroutines of a hundred instructions; numbers of programs have 31.
    sample = (number.to(tl.int32) // n_maps.to(tl.int32)).to(tl.int64)
    first = (number - sample * n_maps) * n
    step = n_maps * n
    map_S_ptr = partials_ptr + tl.load(fields_ptr) + sample * parts[0] * step + first
    map_T_ptr = partials_ptr + tl.load(fields_ptr + 2) + sample * parts[1] * step + first
    pointers = (map_S_ptr, map_T_ptr)
    own_sums_ptr, map_sums_ptr, factors_ptr = None, None, None
    if PHASE != "whole":
        sums_ptr += tl.load(fields_ptr + 8) * SUMS
        own_sums_ptr = sums_ptr + program * SUMS
        map_sums_ptr = sums_ptr + number * n_segments * SUMS
    if addresses_ptr is not None:
        factors_ptr = read_address(addresses_ptr + layer, tl.float32, False) + sample * step + first

    SMALL: tl.constexpr = BLOCK // 4
    where = (step, n, begin, last, n_segments, own_sums_ptr, map_sums_ptr, factors_ptr, n_distances)
    if not MORE and n <= SMALL:
        distance = _compare(pointers, parts, betas, fields_ptr + 6, *where, KIND, PHASE, MORE, SMALL)
    else:
        distance = _compare(pointers, parts, betas, fields_ptr + 6, *where, KIND, PHASE, MORE, BLOCK)

    if PHASE == "whole" or PHASE == "distances":
        distances_ptr += tl.load(fields_ptr + 8)
        n_programs = tl.load(fields_ptr + 9)
        tl.store(distances_ptr + program, distance)
        # acq_rel releases this program's distance and acquires the others': the last program to arrive sees all
        # of them. It reads them from L2 (.cg), since L1 may hold a line that is older than some of them.
        if tl.atomic_add(counters_ptr + layer, 1, sem="acq_rel") == n_programs - 1:
            mean = tl.zeros((MEAN_BLOCK,), tl.float32)
            for start in tl.range(0, n_programs, MEAN_BLOCK):
                index = start + tl.arange(0, MEAN_BLOCK)
                mean += tl.load(distances_ptr + index, mask=index < n_programs, other=0.0, cache_modifier=".cg")
            tl.store(divergences_ptr + layer, tl.sum(mean) / n_distances)
            tl.store(counters_ptr + layer, 0)
