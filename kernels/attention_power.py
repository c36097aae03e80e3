"""``|x|^p`` and its first two derivatives, 0 at x = 0 (except those of x², which is smooth), elementwise in float32.

The square, which nearly everyone uses, is multiplied out; any other exponent goes through ``exp2(p·log2|x|)``.
"""

import triton
import triton.language as tl

LINEAR = tl.constexpr(-1)
"""POWER for x itself: a plain sum over channels (self-attention probabilities over heads).

POWER is 2 for the square, and 0 for an exponent that is known at run time only.
"""


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
    elif POWER == 2:
        value = x * x
    else:
        value = _raise(x, power)
    return value


@triton.jit
def power_slope(x, power, POWER: tl.constexpr):
    """First derivative: p·|x|^(p−1)·sgn x."""
    sign = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
    if POWER == LINEAR:
        slope = tl.full(x.shape, 1.0, tl.float32)
    elif POWER == 2:
        slope = 2 * x
    else:
        slope = power * sign * _raise(x, power - 1)
    return slope


@triton.jit
def power_curvature(x, power, POWER: tl.constexpr):
    """Second derivative: p·(p−1)·|x|^(p−2)."""
    if POWER == LINEAR:
        curvature = tl.zeros(x.shape, tl.float32)
    elif POWER == 2:
        curvature = tl.full(x.shape, 2.0, tl.float32)
    else:
        # |x| itself is straight, and 0 times the infinite power of a denormal number would be NaN.
        curvature = tl.where(power == 1, 0.0, power * (power - 1) * _raise(x, power - 2))
    return curvature
