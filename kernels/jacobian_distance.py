r"""The distance of two derivatives from their four sums, as in :func:`lwkd.reference.jacobian_distance`.

    direction = 2 − 2·ab/√(aa·bb),   norm = |√aa − √bb| / (√aa + √bb),   relative = dd / (aa + bb)

For norms within a factor of two the direction is (dd − (√aa − √bb)²)/√(aa·bb), the same number without the
cancellation, which in float32 would leave nothing of a distance of 1e-6.
"""

import triton
import triton.language as tl


@triton.jit
def jacobian_distance(aa, bb, ab, dd, KIND: tl.constexpr):
    """Distance in float32, computed in float64; NaN where a sum is NaN or infinite."""
    infinite = float("inf")
    finite = (tl.abs(aa) < infinite) & (tl.abs(bb) < infinite) & (tl.abs(ab) < infinite) & (tl.abs(dd) < infinite)
    aa, bb, ab, dd = aa.to(tl.float64), bb.to(tl.float64), ab.to(tl.float64), dd.to(tl.float64)
    none = (aa == 0) & (bb == 0)
    both = (aa != 0) & (bb != 0)
    norm_a, norm_b = tl.sqrt(tl.where(both, aa, 1.0)), tl.sqrt(tl.where(both, bb, 1.0))
    if KIND == "relative":
        found = tl.where(none, 0.0, dd / tl.where(none, 1.0, aa + bb))
    elif KIND == "norm":
        found = tl.where(both, tl.abs(norm_a - norm_b) / (norm_a + norm_b), tl.where(none, 0.0, 1.0))
    else:
        alike = (norm_a <= 2 * norm_b) & (norm_b <= 2 * norm_a)
        gap = norm_a - norm_b
        angle = tl.where(alike, (dd - gap * gap) / (norm_a * norm_b), 2 - 2 * ab / (norm_a * norm_b))
        angle = tl.where(angle < 0, 0.0, tl.where(angle > 4, 4.0, angle))
        found = tl.where(both, angle, tl.where(none, 0.0, 4.0))
    return tl.where(finite, found, float("nan")).to(tl.float32)
