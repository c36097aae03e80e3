// The loops that write gradients of features.

#include "attention_walk.h"
#include "simd8.h"

namespace lwkd {
namespace {

// Slope and curvature of eight numbers. Those of the square are written as vectors: of its numbers one by one, the
// compiler does not always make them, and the loop takes twice as long.
template <class Acc, class Power>
LWKD_INLINE void slope8(const Simd8<Acc>& x, Power power, Simd8<Acc>& slope) {
  if constexpr (std::is_same_v<Power, Square>) {
    slope = x + x;
  } else {
    fill8<Acc>(slope, [&](int j) { return power.slope(x[j]); });
  }
}

template <class Acc, class Power>
LWKD_INLINE void curvature8(const Simd8<Acc>& x, Power power, Simd8<Acc>& curvature) {
  if constexpr (std::is_same_v<Power, Square>) {
    curvature = Simd8<Acc>{} + Acc(2);
  } else {
    fill8<Acc>(curvature, [&](int j) { return power.curvature(x[j]); });
  }
}

// A gradient row: one weight a column (positions adjacent), or one for the whole row (channels adjacent). Such rows are
// short for what the compiler makes of a loop of any length, and are walked in vectors.
template <class T, class Acc, class Power, class Weight>
LWKD_INLINE void scale_row(const T* row, int64_t width, Weight weight, T* __restrict grad, Power power) {
  int64_t i = 0;
  if constexpr (Weight::kSame) {
    Simd8<Acc> x, y, slope_x, slope_y;
    for (; i + 16 <= width; i += 16) {
      load16<T, Acc>(row + i, x, y);
      slope8<Acc>(x, power, slope_x);
      slope8<Acc>(y, power, slope_y);
      store16<T, Acc>(weight(0) * slope_x, weight(0) * slope_y, grad + i);
    }
  }
  for (; i < width; ++i) grad[i] = T(weight(i) * power.slope(Acc(row[i])));
}

template <class T, class Acc, class Power, class Weight>
LWKD_INLINE void scale_row(const T* row, const T* tangent, int64_t width, Weight weight, Weight tangent_weight,
                           T* __restrict grad, T* __restrict grad_tangent, Power power) {
  int64_t i = 0;
  if constexpr (Weight::kSame) {
    const Acc w = weight(0), v = tangent_weight(0);
    const auto scale8 = [&](Simd8<Acc>& x, Simd8<Acc>& dx) {  // become the gradients
      Simd8<Acc> slope, curvature;
      slope8<Acc>(x, power, slope);
      curvature8<Acc>(x, power, curvature);
      x = w * slope + v * curvature * dx;
      dx = v * slope;
    };
    Simd8<Acc> x, y, dx, dy;
    for (; i + 16 <= width; i += 16) {
      load16<T, Acc>(row + i, x, y);
      load16<T, Acc>(tangent + i, dx, dy);
      scale8(x, dx);
      scale8(y, dy);
      store16<T, Acc>(x, y, grad + i);
      store16<T, Acc>(dx, dy, grad_tangent + i);
    }
  }
  for (; i < width; ++i) {
    const Acc x = Acc(row[i]), slope = power.slope(x);
    grad[i] = T(weight(i) * slope + tangent_weight(i) * power.curvature(x) * Acc(tangent[i]));
    grad_tangent[i] = T(tangent_weight(i) * slope);
  }
}

template <class Acc>
struct PerColumn {
  static constexpr bool kSame = false;
  const Acc* weights;
  Acc factor;
  LWKD_INLINE Acc operator()(int64_t i) const { return factor * weights[i]; }
};

template <class Acc>
struct PerRow {
  static constexpr bool kSame = true;
  Acc weight;
  LWKD_INLINE Acc operator()(int64_t) const { return weight; }
};

struct ScaleTile {
  const Tile& tile;
  const void *weight, *tangent_weight;
  double scale_by;
  const FeatureView& grad;
  const FeatureView* grad_tangent;

  template <class T, class Acc, class Power>
  LWKD_INLINE void run(Power power) const {
    const Acc *weights = static_cast<const Acc*>(weight), *tangent_weights = static_cast<const Acc*>(tangent_weight);
    const Acc factor = Acc(scale_by);
    if (tile.feature->channels_last) {
      scale<T>(
          tile.feature->channels, power, [=](int64_t r) { return PerRow<Acc>{factor * weights[r]}; },
          [=](int64_t r) { return PerRow<Acc>{factor * tangent_weights[r]}; });
    } else {
      scale<T>(
          tile.feature->positions, power, [=](int64_t) { return PerColumn<Acc>{weights, factor}; },
          [=](int64_t) { return PerColumn<Acc>{tangent_weights, factor}; });
    }
  }

  // by(r) and tangent_by(r): the weights of a row.
  template <class T, class Power, class By, class TangentBy>
  LWKD_INLINE void scale(int64_t width, Power power, const By& by, const TangentBy& tangent_by) const {
    using Acc = decltype(by(0)(0));
    const int64_t begin = tile.range.begin, count = tile.range.size();
    const auto rows = rows_of<const T>(*tile.feature, tile);
    const auto out = rows_of<T>(grad, tile);
    if (tile.tangent == nullptr) {
      for (int64_t r = 0; r < count; ++r) scale_row<T, Acc>(rows.at(r), width, by(begin + r), out.at(r), power);
      return;
    }
    const auto tangents = rows_of<const T>(*tile.tangent, tile);
    const auto tangent_out = rows_of<T>(*grad_tangent, tile);
    for (int64_t r = 0; r < count; ++r)
      scale_row<T, Acc>(rows.at(r), tangents.at(r), width, by(begin + r), tangent_by(begin + r), out.at(r),
                        tangent_out.at(r), power);
  }
};

}  // namespace

LWKD_MULTIVERSION void scale_tile(const Tile& tile, const void* weight, const void* tangent_weight, double scale,
                                  const FeatureView& grad, const FeatureView* grad_tangent) {
  const ScaleTile job = {tile, weight, tangent_weight, scale, grad, grad_tangent};
  with_dtype(tile.feature->dtype, WithPower<ScaleTile>{tile.power, job});
}

}  // namespace lwkd
