// From maps to distances: normalising, Jensen-Shannon and l2 distance of two maps, and the derivative with respect to
// the student's map before it was normalised.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace lwkd {

enum class DivergenceKind { jsd, l2 };

struct Divergence {
  DivergenceKind kind;
  double student_weight, teacher_weight;  // betas; jsd only
};

// A map whose sum is below this counts as the uniform map, with gradient 0 (lwkd.reference.EMPTY_MAP).
constexpr double kEmptyMap = 1e-24;

// Normalises rows maps of n positions in place. totals[row] receives the sum, or 0 for an empty map.
void normalise_rows(float* maps, int64_t rows, int64_t n, float* totals);
void normalise_rows(double* maps, int64_t rows, int64_t n, double* totals);

// Tangent of a map -> tangent of the map that normalise_rows made of it, in place: (tangent - map sum(tangent)) /
// total, and 0 where the total is 0. Returns sum(tangent).
float normalise_tangent(float* tangent, const float* map, int64_t n, float total);
double normalise_tangent(double* tangent, const double* map, int64_t n, double total);

// Sum over rows of the distance between normalised rows (student, teacher). Unless slopes is null it receives
// d(distance of the row) / d(normalised student row).
double distance_of_rows(const Divergence& how, const float* student, const float* teacher, int64_t rows, int64_t n,
                        float* slopes);
double distance_of_rows(const Divergence& how, const double* student, const double* teacher, int64_t rows, int64_t n,
                        double* slopes);

// Gradient of a normalised map -> gradient of the map it came from, in place:
// (slope - sum(slope * map)) * scale / total; 0 where the total is 0.
void through_normalising(float* slope, const float* map, int64_t n, float total, float scale);
void through_normalising(double* slope, const double* map, int64_t n, double total, double scale);

// A map of n positions and its tangent (null: none) after normalising, the sum of the map before (0 for an empty map),
// and that of the tangent.
template <class Acc>
struct Normalised {
  const Acc *map, *tangent;
  int64_t n;
  Acc total, moved;
};

// With q = r / R and dq = (dr - q sum(dr)) / R, gradients g of q and h of dq (null: none) go back as
//   d(dr) = (h - sum(h q)) / R,   dr = (g' - sum(g' q) - sum(h dq)) / R  with  g' = g - h sum(dr) / R;
// both are 0 for an empty map.
void through_map(const Normalised<float>& of, const float* g, const float* h, float* to_r, float* to_dr);
void through_map(const Normalised<double>& of, const double* g, const double* h, double* to_r, double* to_dr);

}  // namespace lwkd
