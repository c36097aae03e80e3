// How a layer's divergence is formed from its statistics, as in lwkd/reference: jacobian_distance, curvature_distance.
// Distances are NaN where a statistic is NaN or infinite, and zeros never reach a quotient.

#pragma once

#include <c10/util/string_view.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace lwkd {

enum class Ratio { attention, direction, norm, relative, hessian };

// The name must have been checked.
inline Ratio ratio_of(c10::string_view name) {
  if (name == "direction") return Ratio::direction;
  if (name == "norm") return Ratio::norm;
  if (name == "relative") return Ratio::relative;
  return name == "hessian" ? Ratio::hessian : Ratio::attention;
}

// Statistics a layer (lwkd.reference.STATISTICS).
inline int64_t statistics_of(Ratio ratio) { return ratio == Ratio::attention ? 1 : ratio == Ratio::hessian ? 2 : 4; }

// 2 - 2 cos(a, b). Where the norms are within a factor of two, in a form without cancellation.
inline double direction_distance(double aa, double bb, double ab, double dd) {
  const double norm_a = std::sqrt(aa), norm_b = std::sqrt(bb), difference = norm_a - norm_b;
  const bool alike = norm_a <= 2 * norm_b && norm_b <= 2 * norm_a;
  const double found = alike ? (dd - difference * difference) / (norm_a * norm_b) : 2 - 2 * ab / (norm_a * norm_b);
  return std::clamp(found, 0.0, 4.0);
}

inline double norm_distance(double aa, double bb) {
  const double norm_a = std::sqrt(aa), norm_b = std::sqrt(bb);
  return std::abs(norm_a - norm_b) / (norm_a + norm_b);
}

// From the sums aa, bb, ab, dd of two derivatives. Two zeros have distance 0, one zero has the largest there is.
inline double jacobian_distance(Ratio ratio, const double* sums) {
  const double aa = sums[0], bb = sums[1], ab = sums[2], dd = sums[3];
  if (!std::isfinite(aa) || !std::isfinite(bb) || !std::isfinite(ab) || !std::isfinite(dd))
    return std::numeric_limits<double>::quiet_NaN();
  if (aa == 0 && bb == 0) return 0;
  if (ratio == Ratio::relative) return dd / (aa + bb);
  if (aa == 0 || bb == 0) return ratio == Ratio::direction ? 4 : 1;
  return ratio == Ratio::direction ? direction_distance(aa, bb, ab, dd) : norm_distance(aa, bb);
}

// Derivatives of the distance in aa, bb, ab and dd. 0 where it is decided by a zero, or at its clamp; NaN where a sum
// is not finite. As _slopes in lwkd/ops/jacobian.py, which GPUs use.
inline void jacobian_slopes(Ratio ratio, const double* sums, double* slopes) {
  const double aa = sums[0], bb = sums[1], ab = sums[2], dd = sums[3];
  const bool finite = std::isfinite(aa) && std::isfinite(bb) && std::isfinite(ab) && std::isfinite(dd);
  std::fill_n(slopes, 4, finite ? 0.0 : std::numeric_limits<double>::quiet_NaN());
  if (!finite || (ratio == Ratio::relative ? aa + bb == 0 : aa == 0 || bb == 0)) return;
  if (ratio == Ratio::relative) {
    const double total = aa + bb;
    slopes[0] = slopes[1] = -dd / (total * total);
    slopes[3] = 1 / total;
    return;
  }
  const double norm_a = std::sqrt(aa), norm_b = std::sqrt(bb), difference = norm_a - norm_b;
  if (ratio == Ratio::norm) {
    const double sign = (difference > 0) - (difference < 0), total = norm_a + norm_b;
    slopes[0] = sign * norm_b / norm_a / (total * total);
    slopes[1] = -sign * norm_a / norm_b / (total * total);
    return;
  }
  const double product = norm_a * norm_b;
  if (norm_a <= 2 * norm_b && norm_b <= 2 * norm_a) {
    const double apart = dd / product, lean = (aa - bb) / product, angle = apart - difference * difference / product;
    if (angle < 0 || angle > 4) return;
    slopes[0] = (-apart - lean) / 2 / aa;
    slopes[1] = (-apart + lean) / 2 / bb;
    slopes[3] = 1 / product;
  } else {
    const double cosine = ab / product;
    if (cosine > 1 || cosine < -1) return;
    slopes[0] = cosine / aa;
    slopes[1] = cosine / bb;
    slopes[2] = -2 / product;
  }
}

// Between the mean curvatures of student and teacher.
inline double curvature_distance(double student, double teacher) {
  if (student == 0 && teacher == 0) return 0;
  return std::abs(student - teacher) / (std::abs(student) + std::abs(teacher));
}

inline double distance_of(Ratio ratio, const double* statistics) {
  if (ratio == Ratio::attention) return statistics[0];
  if (ratio == Ratio::hessian) return curvature_distance(statistics[0], statistics[1]);
  return jacobian_distance(ratio, statistics);
}

}  // namespace lwkd
