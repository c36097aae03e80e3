"""Every tolerance of the tests, with its reason.

Errors are judged as an RMS ratio, RMS(error) / RMS(reference), beside a small absolute floor, so that a few tiny
entries cannot hide, and cannot fail, a comparison.
"""

from __future__ import annotations

import torch
from torch import Tensor

VALUE = {
    # Input is read exactly and widened; all arithmetic is float32 whatever the input, so the value is as good for
    # half precision as for float32: a few hundred additions of relative error 6e-8, and a logarithm.
    torch.float32: 2e-5,
    torch.float16: 2e-5,
    torch.bfloat16: 2e-5,
    # float64 is computed in float64 throughout.
    torch.float64: 1e-12,
}

GRADIENT = {
    torch.float32: 5e-5,  # one more product and a difference of nearly equal factors than the value
    torch.float16: 2e-3,  # the result is rounded to 11 bits
    torch.bfloat16: 1e-2,  # the result is rounded to 8 bits
    torch.float64: 1e-11,
}

CLOSED_FORM = 1e-9
"""The reference in float64 against a formula worked out by hand: far above rounding, far below any mistake."""

HALF_SPACING = 6e-8
"""Spacing of float16 below 6e-5: a gradient as small as this is rounded to a multiple of it."""

ROUNDING = 1e-12
"""A float64 gradient below this is what rounding leaves of zero, and must not be scaled up (a map of one position)."""

FLOOR = 1e-9
"""Absolute floor: below this a divergence is zero for every purpose of a learning rate."""

SMALL_DIVERGENCE = 1e-3
"""Maps that differ by 1e-4 relative must still have their JSD right to this (float32)."""

SMALL_DIRECTION = 1e-4
"""Derivatives that differ by 1e-6 relative: their direction, 1e-12, is what is left of sums of 1 and must be right to
this (float32 input, whose products are exact in float64)."""

TRUNCATING_CAST = 8e-3
"""Triton's interpreter truncates float32 to bfloat16 where compiled code rounds: one unit in the last of 8 bits."""

FRESH_INPUTS = 3
"""The random inputs of a run on a GPU may be less kind than the fixed ones that tolerances were made for."""

SIGNED_SUM = {
    # Of the sum of magnitudes: at most 32 additions in float32 in a row, and the result is rounded to float32.
    torch.float32: 33 * 6e-8,
    # At most 32 + 9 + tiles + tensors additions of relative error 1.1e-16, and as many in the sum it is compared with.
    torch.float64: 1e-14,
}
"""A sum that cancels cannot be judged by what is left of it."""

CURVATURE = {
    # A product with the Hessian: a few passes of a few hundred additions each, and terms of either sign.
    torch.float32: 1e-4,
    torch.float64: 1e-11,
}
"""Of one probe's traces against the exact matrix."""

IEEE_PASSES = 1e-3
"""Sums over whole passes in float32 against float64: 3e-7 (Jacobian) and 1e-5 (Hessian) on a CPU, in other orders of
summation a few times that; with convolutions in emulated TF32 they are 1e-2 and 5e-3 off."""

SECOND_DIFFERENCE = 1e-5
"""Second difference in float64 with a step of 1e-4: 1e-8 of truncation and 1e-16 / 1e-8 of rounding, both times the
higher derivatives of a map, up to a hundred."""

NOISY_BUDGET = {0.1: (0.05, 1.15), 0.3: (0.25, 1.6)}
"""By the noise of one cost: share of runs that may exceed a budget, and how far. Three costs foretell the mean to
noise/√3 (6 %, 17 %), against a margin of 15 %; the cost of a whole interval is rounded up besides."""

COVERAGE = 0.93, 0.97
"""Of intervals of 95 %, pooled over 2,000 runs: four standard deviations if a run's layers hit or miss together."""

SKEWED = {8: (0.82, 0.92), 32: (0.89, 0.96)}
"""Coverage by probes for Gauss-Newton traces: 0.87 and 0.92 measured with 200 runs, and 120 runs whose layers hit or
miss together to a good part are ±3 %."""

SHRINKING = 0.15
"""Of the logarithm of a ratio of standard errors, each from 20 runs of 4 probes or more (60 squares, so ±9 %) or from
100 runs (±7 %), averaged over six layers."""

SPREAD = 0.1
"""Of the logarithm of said to found standard deviation: 200 runs of 50 layers give the latter to within 1 %, the root
mean square of the former to within 3 %, and the delta method leaves out terms of second order (5 % at this noise)."""

STANDARD_ERRORS = 4.5
"""Of a mean of independent signs: exceeded once in 150,000 cases, and the seeds are fixed."""

DIFFERENCE_SMOOTH = 1e-5
"""A forward difference in float64 at a step of 1e-6 of the input: the error is the step times the curvature."""

DIFFERENCE_RELU = 0.05
"""A forward difference in float32: rounding (6e-8 / 1e-4), which the net amplifies, and units that switch within the
step."""


def rms_error(found: Tensor, expected: Tensor) -> float:
    """RMS(found − expected) / RMS(expected); the plain RMS error where the reference is all zero."""
    error = (found.double() - expected.double()).square().mean().sqrt()
    scale = expected.double().square().mean().sqrt()
    return float(error / scale) if scale > 0 else float(error)


def assert_close(found: Tensor, expected: Tensor, tolerance: float, floor: float = FLOOR) -> None:
    """Fail unless the RMS error ratio is within the tolerance, or every entry is within the floor."""
    assert found.shape == expected.shape, f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(found).all(), "not finite"
    if (found.double() - expected.double()).abs().max() <= floor:
        return
    error = rms_error(found, expected)
    assert error <= tolerance, f"RMS error ratio {error:.2e}, tolerance {tolerance:.0e}"
