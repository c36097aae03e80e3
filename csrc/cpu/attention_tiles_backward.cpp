// The loops that write gradients of features.

#include "attention_walk.h"
#include "simd8.h"

namespace lwkd {
namespace {

// A gradient row: one weight a column (positions adjacent), or one for the whole row (channels adjacent). Such rows are
// short for what the compiler makes of a loop of any length, and are walked in vectors.
template <class T, class Acc, class Power, class Weight>
LWKD_INLINE void scale_row(const T* row, int64_t width, Weight weight, T* __restrict grad, Power power) {
  int64_t i = 0;
  if constexpr (Weight::kSame) {
    Simd8<Acc> x, y, scaled_x, scaled_y;
    for (; i + 16 <= width; i += 16) {
      load16<T, Acc>(row + i, x, y);
      fill8<Acc>(scaled_x, [&](int j) { return weight(j) * power.slope(x[j]); });
      fill8<Acc>(scaled_y, [&](int j) { return weight(j) * power.slope(y[j]); });
      store16<T, Acc>(scaled_x, scaled_y, grad + i);
    }
  }
  for (; i < width; ++i) grad[i] = T(weight(i) * power.slope(Acc(row[i])));
}

template <class T, class Acc, class Power, class Weight>
LWKD_INLINE void scale_row(const T* row, const T* tangent, int64_t width, Weight weight, Weight tangent_weight,
                           T* __restrict grad, T* __restrict grad_tangent, Power power) {
  int64_t i = 0;
  if constexpr (Weight::kSame) {
    Simd8<Acc> x[2], dx[2], scaled[2], tangent_scaled[2];
    for (; i + 16 <= width; i += 16) {
      load16<T, Acc>(row + i, x[0], x[1]);
      load16<T, Acc>(tangent + i, dx[0], dx[1]);
      for (int k = 0; k < 2; ++k) {
        fill8<Acc>(scaled[k], [&](int j) {
          return weight(j) * power.slope(x[k][j]) + tangent_weight(j) * power.curvature(x[k][j]) * dx[k][j];
        });
        fill8<Acc>(tangent_scaled[k], [&](int j) { return tangent_weight(j) * power.slope(x[k][j]); });
      }
      store16<T, Acc>(scaled[0], scaled[1], grad + i);
      store16<T, Acc>(tangent_scaled[0], tangent_scaled[1], grad_tangent + i);
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
