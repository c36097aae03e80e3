// The loops that write gradients of features.

#include "attention_tiles.h"

namespace lwkd {
namespace {

// A gradient row: one weight a column (positions adjacent), or one for the whole row (channels adjacent).
template <class T, class Acc, class Power, class Weight>
LWKD_INLINE void scale_row(const T* row, int64_t width, Weight weight, T* __restrict grad, Power power) {
  for (int64_t i = 0; i < width; ++i) grad[i] = T(weight(i) * power.slope(Acc(row[i])));
}

template <class T, class Acc, class Power, class Weight>
LWKD_INLINE void scale_row(const T* row, const T* tangent, int64_t width, Weight weight, Weight tangent_weight,
                           T* __restrict grad, T* __restrict grad_tangent, Power power) {
  for (int64_t i = 0; i < width; ++i) {
    const Acc x = Acc(row[i]), slope = power.slope(x);
    grad[i] = T(weight(i) * slope + tangent_weight(i) * power.curvature(x) * Acc(tangent[i]));
    grad_tangent[i] = T(tangent_weight(i) * slope);
  }
}

template <class Acc>
struct PerColumn {
  const Acc* weights;
  Acc factor;
  LWKD_INLINE Acc operator()(int64_t i) const { return factor * weights[i]; }
};

template <class Acc>
struct PerRow {
  Acc weight;
  LWKD_INLINE Acc operator()(int64_t) const { return weight; }
};

template <class T>
LWKD_INLINE T* row_of(const FeatureView& view, int64_t sample, int64_t row) {
  return reinterpret_cast<T*>(view.sample(sample)) + row * view.row_stride();
}

struct ScaleTile {
  const Tile& tile;
  const void *weight, *tangent_weight;
  double scale_by;
  const FeatureView& grad;
  const FeatureView* grad_tangent;

  template <class T, class Acc, class Power>
  LWKD_INLINE void run(Power power) const {
    const Acc *weights = static_cast<const Acc*>(weight), *tangent_weights = static_cast<const Acc*>(tangent_weight);
    const bool last = tile.feature->channels_last;
    const Acc factor = Acc(scale_by);
    for (int64_t r = tile.range.begin; r < tile.range.end; ++r) {
      if (last) {
        scale<T, Acc>(r, tile.feature->channels, PerRow<Acc>{factor * weights[r]},
                      PerRow<Acc>{tile.tangent ? factor * tangent_weights[r] : Acc(0)}, power);
      } else {
        scale<T, Acc>(r, tile.feature->positions, PerColumn<Acc>{weights, factor},
                      PerColumn<Acc>{tangent_weights, factor}, power);
      }
    }
  }

  template <class T, class Acc, class Power, class Weight>
  LWKD_INLINE void scale(int64_t r, int64_t width, Weight by, Weight tangent_by, Power power) const {
    const T* row = row_of<T>(*tile.feature, tile.sample, r);
    T* out = row_of<T>(grad, tile.sample, r);
    if (tile.tangent) {
      scale_row<T, Acc>(row, row_of<T>(*tile.tangent, tile.sample, r), width, by, tangent_by, out,
                        row_of<T>(*grad_tangent, tile.sample, r), power);
    } else {
      scale_row<T, Acc>(row, width, by, out, power);
    }
  }
};

}  // namespace

LWKD_MULTIVERSION void scale_tile(const Tile& tile, const void* weight, const void* tangent_weight, double scale,
                                  const FeatureView& grad, const FeatureView* grad_tangent) {
  const ScaleTile job = {tile, weight, tangent_weight, scale, grad, grad_tangent};
  with_dtype(tile.feature->dtype, WithPower<ScaleTile>{tile.power, job});
}

}  // namespace lwkd
