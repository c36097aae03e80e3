// The loops over features, cut into tiles: a tile is part of one sample of one feature, and each feature is read once.
// sum_tile (attention_tiles.cpp) forms maps, scale_tile (attention_tiles_backward.cpp) gradients.

#pragma once

#include <cstdint>

#include "feature_view.h"
#include "powers.h"

namespace lwkd {

// Positions a tile sums at a time: their partial sums stay in the first-level cache.
constexpr int64_t kTileColumns = 4096;

// Adjacent maps shorter than this are folded: k channel rows of N positions are summed as one row of k N columns.
constexpr int64_t kFoldedColumns = 1024;

constexpr int64_t kBlockRows = 8;  // channels summed at a time

inline int64_t fold_of(const FeatureView& view) {
  const int64_t wanted = (kFoldedColumns + view.positions - 1) / view.positions;
  return std::max<int64_t>(1, std::min(wanted, view.channels / kBlockRows));
}

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The channels of a range at all positions of one sample or, with channels last, all channels at the positions of a
// range.
struct Tile {
  const FeatureView* feature;
  const FeatureView* tangent;  // null, or laid out like the feature
  int64_t sample;
  Range range;
  double power;  // as in powers.h, kIdentityPower for the plain sum
};

// map[n] = sum over the tile's channels of |F|^p, in the accumulation dtype of the feature. A tile of channels writes
// all N positions, a tile of positions writes its own: map is the start of the sample's map in both cases.
// With a tangent, tangent_map[n] = sum of p |F|^(p-1) sgn(F) dF.
void sum_tile(const Tile& tile, void* map, void* tangent_map);

// grad = w[n] * slope(F) with w = scale * weight, and with a tangent
//   grad = w[n] * slope(F) + v[n] * curvature(F) * dF,   grad_tangent = v[n] * slope(F),   v = scale * tangent_weight.
// Weights are in the accumulation dtype; each gradient view is laid out like the feature.
void scale_tile(const Tile& tile, const void* weight, const void* tangent_weight, double scale, const FeatureView& grad,
                const FeatureView* grad_tangent);

// The tiles of one sample, the same for every sample and any number of threads. Channels are cut at multiples of the
// folded block, so that only the last tile has a remainder.
struct Cut {
  int64_t tiles, step, total;

  Range range(int64_t tile) const { return {tile * step, std::min(total, (tile + 1) * step)}; }
};

Cut cut_sample(const FeatureView& view, int64_t tile_bytes);

// Tiles of all features together: small enough to share out evenly, large enough to be worth a turn in the queue.
inline int64_t tile_bytes_for(int64_t total_bytes) { return std::clamp<int64_t>(total_bytes / 64, 128 << 10, 1 << 20); }

}  // namespace lwkd
