"""``|x|^p`` and its first two derivatives, 0 at x = 0 (but for x² itself, which is smooth), elementwise in float32.

Whole exponents up to 4 are multiplied out; any other goes through ``exp2(p·log2|x|)``.
"""

import triton
import triton.language as tl

LINEAR = tl.constexpr(-1)
"""POWER for x itself: a plain sum over channels (self-attention probabilities over heads)."""
ANY_POWER = tl.constexpr(0)
"""POWER for an exponent that is only known at run time."""


@triton.jit
def _raise(x, power):
    """|x|^power, 0 at x = 0."""
    zero = x == 0
    return tl.where(zero, 0.0, tl.exp2(power * tl.log2(tl.where(zero, 1.0, tl.abs(x)))))


@triton.jit
def power_value(x, power, POWER: tl.constexpr):
    """|x|^p; x itself where POWER is LINEAR."""
    if POWER == LINEAR:
        value = x
    elif POWER == 1:
        value = tl.abs(x)
    elif POWER == 2:
        value = x * x
    elif POWER == 3:
        value = x * x * tl.abs(x)
    elif POWER == 4:
        value = (x * x) * (x * x)
    else:
        value = _raise(x, power)
    return value


@triton.jit
def power_slope(x, power, POWER: tl.constexpr):
    """First derivative: p·|x|^(p−1)·sgn x."""
    sign = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
    if POWER == LINEAR:
        slope = tl.full(x.shape, 1.0, tl.float32)
    elif POWER == 1:
        slope = sign
    elif POWER == 2:
        slope = 2 * x
    elif POWER == 3:
        slope = 3 * x * tl.abs(x)
    elif POWER == 4:
        slope = 4 * x * (x * x)
    else:
        slope = power * sign * _raise(x, power - 1)
    return slope


@triton.jit
def power_curvature(x, power, POWER: tl.constexpr):
    """Second derivative: p·(p−1)·|x|^(p−2)."""
    if POWER == LINEAR or POWER == 1:
        curvature = tl.zeros(x.shape, tl.float32)
    elif POWER == 2:
        curvature = tl.full(x.shape, 2.0, tl.float32)
    elif POWER == 3:
        curvature = 6 * tl.abs(x)
    elif POWER == 4:
        curvature = 12 * (x * x)
    else:
        curvature = power * (power - 1) * _raise(x, power - 2)
    return curvature


def power_code(power: float, source: str = "features") -> int:
    """The POWER of a launch: small whole exponents are multiplied out."""
    if source == "probabilities":
        return LINEAR.value
    return int(power) if power in (1, 2, 3, 4) else ANY_POWER.value
