#include "map_divergence.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "multiversion.h"

namespace lwkd {
namespace {

constexpr int kLanes = 16;  // fixed: it decides the order of the sums

template <class Acc>
LWKD_INLINE Acc sum_lanes(Acc* lanes) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  return lanes[0];
}

template <class Acc>
LWKD_INLINE Acc sum_of(const Acc* values, int64_t n) {
  Acc lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] += values[i + j];
  for (int j = 0; i + j < n; ++j) lanes[j] += values[i + j];
  return sum_lanes(lanes);
}

// atanh(s) - s for |s| < 0.18: the series s^3/3 + s^5/5 + ..., to the last bit of Acc.
template <class Acc>
LWKD_INLINE Acc atanh_excess(Acc s) {
  const Acc z = s * s;
  Acc sum;
  if constexpr (std::is_same_v<Acc, float>) {
    sum = Acc(1) / 11;
    sum = sum * z + Acc(1) / 9;
    sum = sum * z + Acc(1) / 7;
    sum = sum * z + Acc(1) / 5;
  } else {
    sum = Acc(1) / 23;
    sum = sum * z + Acc(1) / 21;
    sum = sum * z + Acc(1) / 19;
    sum = sum * z + Acc(1) / 17;
    sum = sum * z + Acc(1) / 15;
    sum = sum * z + Acc(1) / 13;
    sum = sum * z + Acc(1) / 11;
    sum = sum * z + Acc(1) / 9;
    sum = sum * z + Acc(1) / 7;
    sum = sum * z + Acc(1) / 5;
  }
  return s * z * (sum * z + Acc(1) / 3);
}

// a >= 0 as fraction * 2^exponent with the fraction in [0.70, 1.42), as far from 1 as the series above is exact.
LWKD_INLINE float split(float a, float& exponent) {
  int32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  const int32_t power = (bits - 0x3f35'0000) >> 23;
  bits -= static_cast<int32_t>(static_cast<uint32_t>(power) << 23);
  exponent = static_cast<float>(power);
  float fraction;
  std::memcpy(&fraction, &bits, sizeof fraction);
  return fraction;
}

LWKD_INLINE double split(double a, double& exponent) {
  int64_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  const int64_t power = (bits - 0x3fe6'a000'0000'0000) >> 52;
  bits -= static_cast<int64_t>(static_cast<uint64_t>(power) << 52);
  exponent = static_cast<double>(power);
  double fraction;
  std::memcpy(&fraction, &bits, sizeof fraction);
  return fraction;
}

// log(1 + u), and the excess (1 + u) log(1 + u) - u, where a = 1 + u >= 0 is given as well, so that neither a small u
// nor a small a is ever the result of a subtraction. With s = u / (2 + u):
//   log(1 + u) = 2 atanh(s),   excess = 2 (s^2 + (1 + s)(atanh(s) - s)) / (1 - s)   for small u;
// for others s belongs to the fraction of a, and the exponent adds its multiple of log 2.
template <class Acc>
LWKD_INLINE void log_and_excess(Acc u, Acc a, Acc& log, Acc& excess) {
  const bool small = u < Acc(0.25) && u > Acc(-0.25);
  Acc exponent;
  const Acc fraction = split(a, exponent);
  const Acc f = small ? u : fraction - 1;
  const Acc s = f / (2 + f);
  const Acc t = atanh_excess(s);
  const Acc inner = 2 * (s + t);
  const Acc outer = inner + exponent * Acc(0.693147180559945309417232121458);
  log = small ? inner : outer;
  excess = small ? 2 * (s * s + (1 + s) * t) / (1 - s) : a * outer - u;
}

// JSD = sum m (b1 g(b2 x) + b2 g(-b1 x)) with m = b1 q + b2 p, x = (q - p) / m, g(u) = (1 + u) log(1 + u) - u:
// exact for nearly equal maps too, where the difference of entropies cancels. d/dq = b1 log(q / m); at q = 0, where
// that is infinite, the reference's finite value -b1 is taken (the feature there is 0, and so its gradient).
template <class Acc>
LWKD_INLINE Acc jsd_term(Acc q, Acc p, Acc b1, Acc b2, Acc& slope) {
  const Acc m = b1 * q + b2 * p;
  const Acc safe = m == 0 ? Acc(1) : m;
  const Acc difference = q - p;
  const Acc x = difference / safe;
  Acc log_q, log_p, excess_q, excess_p;
  log_and_excess(b2 * x, q / safe, log_q, excess_q);
  log_and_excess(-b1 * x, p / safe, log_p, excess_p);
  slope = m == 0 ? Acc(0) : (q == 0 ? -b1 : b1 * log_q);
  return m * (b1 * excess_q + b2 * excess_p);
}

template <class Acc>
LWKD_INLINE Acc jsd(const Acc* q, const Acc* p, int64_t n, Acc b1, Acc b2, Acc* slopes) {
  Acc lanes[kLanes] = {}, ignored[kLanes];
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Acc* slope = slopes ? slopes + i : ignored;
    for (int j = 0; j < kLanes; ++j) lanes[j] += jsd_term(q[i + j], p[i + j], b1, b2, slope[j]);
  }
  for (int j = 0; i + j < n; ++j) lanes[j] += jsd_term(q[i + j], p[i + j], b1, b2, slopes ? slopes[i + j] : ignored[j]);
  return sum_lanes(lanes);
}

template <class Acc>
LWKD_INLINE Acc dot(const Acc* a, const Acc* b, int64_t n) {
  Acc lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] += a[i + j] * b[i + j];
  for (int j = 0; i + j < n; ++j) lanes[j] += a[i + j] * b[i + j];
  return sum_lanes(lanes);
}

// |u - v|^2 with u = q/|q|, v = p/|p|; d/dq = (w - u (u.w)) / |q| with w = 2 (u - v).
template <class Acc>
LWKD_INLINE Acc l2(const Acc* q, const Acc* p, int64_t n, Acc* slopes) {
  const Acc norm_q = std::sqrt(dot(q, q, n)), norm_p = std::sqrt(dot(p, p, n));
  double distance = 0, along = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double u = q[i] / norm_q, difference = u - p[i] / norm_p;
    distance += difference * difference;
    along += 2 * difference * u;
  }
  if (slopes)
    for (int64_t i = 0; i < n; ++i) {
      const Acc u = q[i] / norm_q;
      slopes[i] = (2 * (u - p[i] / norm_p) - u * Acc(along)) / norm_q;
    }
  return Acc(distance);
}

template <class Acc>
LWKD_INLINE double distance_of_all(const Divergence& how, const Acc* student, const Acc* teacher, int64_t rows,
                                   int64_t n, Acc* slopes) {
  double sum = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const Acc *q = student + row * n, *p = teacher + row * n;
    Acc* row_slopes = slopes ? slopes + row * n : nullptr;
    sum += how.kind == DivergenceKind::jsd ? jsd(q, p, n, Acc(how.student_weight), Acc(how.teacher_weight), row_slopes)
                                           : l2(q, p, n, row_slopes);
  }
  return sum;
}

template <class Acc>
LWKD_INLINE void normalise_all(Acc* maps, int64_t rows, int64_t n, Acc* totals) {
  for (int64_t row = 0; row < rows; ++row) {
    Acc* map = maps + row * n;
    Acc total = sum_of(map, n);
    // A quotient by infinity would be 0, and the distance some number.
    if (std::isinf(total)) total = std::numeric_limits<Acc>::quiet_NaN();
    const bool empty = total < Acc(kEmptyMap);
    totals[row] = empty ? Acc(0) : total;
    for (int64_t i = 0; i < n; ++i) map[i] = empty ? Acc(1) / Acc(n) : map[i] / total;
  }
}

template <class Acc>
LWKD_INLINE Acc normalised_tangent(Acc* tangent, const Acc* map, int64_t n, Acc total) {
  const Acc moved = sum_of(tangent, n);
  for (int64_t i = 0; i < n; ++i) tangent[i] = total == 0 ? Acc(0) : (tangent[i] - map[i] * moved) / total;
  return moved;
}

template <class Acc>
LWKD_INLINE void normalised_backward(Acc* slope, const Acc* map, int64_t n, Acc total, Acc scale) {
  const Acc shift = dot(slope, map, n);
  const Acc factor = total == 0 ? Acc(0) : scale / total;
  for (int64_t i = 0; i < n; ++i) slope[i] = (slope[i] - shift) * factor;
}

template <class Acc>
LWKD_INLINE void map_backward(const Normalised<Acc>& of, const Acc* g, const Acc* h, Acc* __restrict to_r,
                              Acc* __restrict to_dr) {
  const int64_t n = of.n;
  const Acc per_total = of.total == 0 ? Acc(0) : 1 / of.total;
  const Acc g_mean = dot(g, of.map, n);
  if (h == nullptr) {
    for (int64_t i = 0; i < n; ++i) to_r[i] = (g[i] - g_mean) * per_total;
    return;
  }
  const Acc h_mean = dot(h, of.map, n), moved = of.moved * per_total;
  const Acc shift = g_mean - moved * h_mean + dot(h, of.tangent, n);
  for (int64_t i = 0; i < n; ++i) {
    to_r[i] = (g[i] - moved * h[i] - shift) * per_total;
    to_dr[i] = (h[i] - h_mean) * per_total;
  }
}

}  // namespace

LWKD_MULTIVERSION void through_map(const Normalised<float>& of, const float* g, const float* h, float* to_r,
                                   float* to_dr) {
  map_backward(of, g, h, to_r, to_dr);
}

LWKD_MULTIVERSION void through_map(const Normalised<double>& of, const double* g, const double* h, double* to_r,
                                   double* to_dr) {
  map_backward(of, g, h, to_r, to_dr);
}

LWKD_MULTIVERSION void normalise_rows(float* maps, int64_t rows, int64_t n, float* totals) {
  normalise_all(maps, rows, n, totals);
}

LWKD_MULTIVERSION void normalise_rows(double* maps, int64_t rows, int64_t n, double* totals) {
  normalise_all(maps, rows, n, totals);
}

LWKD_MULTIVERSION float normalise_tangent(float* tangent, const float* map, int64_t n, float total) {
  return normalised_tangent(tangent, map, n, total);
}

LWKD_MULTIVERSION double normalise_tangent(double* tangent, const double* map, int64_t n, double total) {
  return normalised_tangent(tangent, map, n, total);
}

LWKD_MULTIVERSION double distance_of_rows(const Divergence& how, const float* student, const float* teacher,
                                          int64_t rows, int64_t n, float* slopes) {
  return distance_of_all(how, student, teacher, rows, n, slopes);
}

LWKD_MULTIVERSION double distance_of_rows(const Divergence& how, const double* student, const double* teacher,
                                          int64_t rows, int64_t n, double* slopes) {
  return distance_of_all(how, student, teacher, rows, n, slopes);
}

LWKD_MULTIVERSION void through_normalising(float* slope, const float* map, int64_t n, float total, float scale) {
  normalised_backward(slope, map, n, total, scale);
}

LWKD_MULTIVERSION void through_normalising(double* slope, const double* map, int64_t n, double total, double scale) {
  normalised_backward(slope, map, n, total, scale);
}

}  // namespace lwkd
