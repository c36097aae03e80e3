"""The specification: what every op of :mod:`lwkd.ops` computes, in plain PyTorch, one file a stem.

These functions are slow and obvious on purpose, and every fast implementation is tested against them. They run in
float64 as in any other floating dtype, on every device, and are differentiable as often as PyTorch is. Half-precision
input is widened to float32 first, as the kernels do.

Arguments, results, errors and sources are described once, at the op of the same name in :mod:`lwkd.ops`.
"""

from lwkd.reference.attention import (
    EMPTY_MAP,
    LARGEST_JSD,
    DivergenceKind,
    Source,
    attention_divergence,
    attention_maps,
    common_size,
)
from lwkd.reference.hutchinson import curvature_distance, hutchinson_trace, rademacher
from lwkd.reference.jacobian import JacobianKind, jacobian_distance, jacobian_divergence, jacobian_sums
from lwkd.reference.rates import STATISTICS, Policy, RateState, Ratio, divergence_of, initial_rates, update_rates

__all__ = [
    "EMPTY_MAP",
    "LARGEST_JSD",
    "STATISTICS",
    "DivergenceKind",
    "JacobianKind",
    "Policy",
    "RateState",
    "Ratio",
    "Source",
    "attention_divergence",
    "attention_maps",
    "common_size",
    "curvature_distance",
    "divergence_of",
    "hutchinson_trace",
    "initial_rates",
    "jacobian_distance",
    "jacobian_divergence",
    "jacobian_sums",
    "rademacher",
    "update_rates",
]
