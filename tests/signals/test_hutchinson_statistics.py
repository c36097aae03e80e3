"""Intervals of hessian_trace and ggn_trace: how often they cover the exact trace, and how they shrink."""

from __future__ import annotations

import math
from typing import Any

import curved
import torch
from scipy.stats import t as student_t
from tolerances import COVERAGE, SHRINKING, SKEWED
from torch import Tensor

import lwkd
from lwkd import ops
from lwkd.signals import hutchinson

NETS = ("conv", "batchnorm", "attention", "tied")
PROBES = 8
RUNS = 500
BY_ESTIMATOR = 25
"""Of the runs of each net, how many are made by hessian_trace itself; the others use its ops on the exact matrix."""


def by_ops(matrix: Tensor, like: list[Tensor], seed: int) -> lwkd.TraceEstimate:
    """What hessian_trace does, with the Hessian at hand instead of the net: the same signs, reduction and error."""
    traces, lengths = [], [p.numel() for p in like]
    for probe in range(PROBES):
        key = hutchinson._key(seed, probe)
        product = matrix @ torch.cat([v.flatten() for v in ops.rademacher(like, key)])
        traces.append(ops.hutchinson_trace(product.split(lengths), range(len(like)), key, len(like)))
    return hutchinson._estimate(tuple(map(str, range(len(like)))), traces)


def covered(found: lwkd.TraceEstimate, exact: Tensor, probes: int = PROBES) -> Tensor:
    """Which layers' intervals of 95 % hold the exact trace."""
    return (found.trace - exact).abs() <= float(student_t.ppf(0.975, probes - 1)) * found.stderr


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """2,000 runs with disjoint probes over four nets, every layer of a run counted.

    The layers of one run are not independent: cov(τ_l, τ_m) = ‖H_lm‖² (each holds v_l·H_lm v_m). So the run is the
    unit: were its layers to hit or miss together, the pooled share would have a standard deviation of
    √(0.95·0.05/2000) = 0.5 %, and it has less. Parameters whose trace is the same for every probe (nothing off the
    diagonal) would be covered or not by rounding alone, and are left out.
    """
    shares, layers = [], 0
    for name in NETS:
        case = curved.case(name)
        matrix, like = curved.hessian(case.net, case.x), curved.parameters(case.net)
        exact = curved.traces(matrix, curved.sizes(case.net))
        blocks = [matrix[rows][:, rows] for rows in torch.arange(len(matrix)).split(curved.sizes(case.net))]
        noisy = torch.tensor([bool((b - b.diagonal().diag()).abs().max() > 1e-9) for b in blocks])
        assert noisy.sum() >= 2
        layers += int(noisy.sum())
        for run in range(RUNS):
            if run < BY_ESTIMATOR:
                found = lwkd.hessian_trace(case.net, case.loss, probes=PROBES, seed=run)
            else:
                found = by_ops(matrix, like, seed=run)
            shares.append(covered(found, exact)[noisy].double().mean())
    hit = torch.stack(shares)
    assert len(hit) == 2000
    assert COVERAGE[0] <= float(hit.mean()) <= COVERAGE[1]


def test_the_ops_on_the_exact_matrix_are_the_estimator() -> None:
    """What the pool above rests on."""
    for name in NETS:
        case = curved.case(name)
        for seed in (0, 400):
            found = lwkd.hessian_trace(case.net, case.loss, probes=PROBES, seed=seed)
            other = by_ops(curved.hessian(case.net, case.x), curved.parameters(case.net), seed)
            torch.testing.assert_close(found.trace, other.trace, rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(found.stderr, other.stderr, rtol=1e-8, atol=1e-10)


def test_intervals_of_the_gauss_newton_trace_are_short_until_there_are_many_probes() -> None:
    """A square of sums of signs is skewed: a mean that is too small comes with a standard error that is too small."""
    shares = {}
    for probes in (8, 32):
        found = []
        for name in ("conv", "attention"):
            case = curved.case(name)
            exact = case.exact(lwkd.ggn_trace)
            for seed in range(60):
                estimate = case.estimate(lwkd.ggn_trace, probes=probes, seed=seed)
                found.append(covered(estimate, exact, probes).double().mean())
        shares[probes] = float(torch.stack(found).mean())
    assert SKEWED[8][0] <= shares[8] <= SKEWED[8][1]
    assert SKEWED[32][0] <= shares[32] <= SKEWED[32][1]


@curved.estimators
def test_the_standard_error_shrinks_with_the_root_of_the_probes(estimator: Any) -> None:
    case = curved.case("conv")
    few, many = (
        torch.stack([case.estimate(estimator, probes=n, seed=s).stderr.square() for s in range(20)]).mean(0).sqrt()
        for n in (4, 64)
    )
    ratio = (few[few > 1e-9] / many[few > 1e-9]).log().mean().exp()
    assert abs(math.log(float(ratio) / 4)) < SHRINKING


@curved.estimators
def test_the_standard_error_is_that_of_the_mean(estimator: Any) -> None:
    """Means of 100 runs scatter as their own standard errors say."""
    case = curved.case("conv")
    found = [case.estimate(estimator, probes=PROBES, seed=seed) for seed in range(100)]
    scatter = torch.stack([f.trace for f in found]).std(0)
    said = torch.stack([f.stderr.square() for f in found]).mean(0).sqrt()
    ratio = (scatter[said > 1e-9] / said[said > 1e-9]).log().mean().exp()
    assert abs(math.log(float(ratio))) < SHRINKING
