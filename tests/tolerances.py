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

TRUNCATING_CAST = 8e-3
"""Triton's interpreter truncates float32 to bfloat16 where compiled code rounds: one unit in the last of 8 bits."""


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
