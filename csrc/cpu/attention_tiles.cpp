// sum_tile, its half for features with positions adjacent, and how samples are cut into tiles.

#include <algorithm>

#include "attention_walk.h"

namespace lwkd {
namespace {

// Rows summed at a time: half as many with a tangent, so that as many streams of memory are read.
template <bool kTangent>
constexpr int64_t kRowsAtATime = kTangent ? kBlockRows / 2 : kBlockRows;

template <class T, class Acc, class Power>
LWKD_INLINE Acc value_of_four(const T* r, int64_t stride, Power power) {
  return (power.value(Acc(r[0])) + power.value(Acc(r[stride]))) +
         (power.value(Acc(r[2 * stride])) + power.value(Acc(r[3 * stride])));
}

template <class T, class Acc, class Power>
LWKD_INLINE Acc tangent_of_four(const T* r, int64_t stride, const T* t, int64_t tangent_stride, Power power) {
  return (power.slope(Acc(r[0])) * Acc(t[0]) + power.slope(Acc(r[stride])) * Acc(t[tangent_stride])) +
         (power.slope(Acc(r[2 * stride])) * Acc(t[2 * tangent_stride]) +
          power.slope(Acc(r[3 * stride])) * Acc(t[3 * tangent_stride]));
}

// sums[n] += the sum over the first rows, kRows of them, for the columns from begin to end.
template <int64_t kRows, class T, class Acc, class Power>
LWKD_INLINE void add_block(Rows<const T> rows, int64_t begin, int64_t end, Acc* __restrict sums, Power power) {
  const T* r = rows.first;
  const int64_t stride = rows.stride;
#pragma GCC unroll 1
  for (int64_t n = begin; n < end; ++n) {
    if constexpr (kRows == 1) {
      sums[n] += power.value(Acc(r[n]));
    } else {
      sums[n] += value_of_four<T, Acc>(r + n, stride, power) + value_of_four<T, Acc>(r + n + 4 * stride, stride, power);
    }
  }
}

template <int64_t kRows, class T, class Acc, class Power>
LWKD_INLINE void add_block(Rows<const T> rows, Rows<const T> tangents, int64_t begin, int64_t end, Acc* __restrict sums,
                           Acc* __restrict tangent_sums, Power power) {
  const T *r = rows.first, *t = tangents.first;
  const int64_t stride = rows.stride, tangent_stride = tangents.stride;
#pragma GCC unroll 1
  for (int64_t n = begin; n < end; ++n) {
    if constexpr (kRows == 1) {
      sums[n] += power.value(Acc(r[n]));
      tangent_sums[n] += power.slope(Acc(r[n])) * Acc(t[n]);
    } else {
      sums[n] += value_of_four<T, Acc>(r + n, stride, power);
      tangent_sums[n] += tangent_of_four<T, Acc>(r + n, stride, t + n, tangent_stride, power);
    }
  }
}

template <int64_t kRows, bool kTangent, class T, class Acc, class Power>
LWKD_INLINE void add_block(const Walk<kTangent, T, Power>& walk, int64_t begin, int64_t end, Acc* sums,
                           Acc* tangent_sums) {
  if constexpr (kTangent) {
    add_block<kRows>(walk.rows, walk.tangents, begin, end, sums, tangent_sums, walk.power);
  } else {
    add_block<kRows>(walk.rows, begin, end, sums, walk.power);
  }
}

// sums[n] += sum over rows, several rows at a time, while the next ones are fetched into the second-level cache. After
// the last row those of the next tile are fetched, which the same thread usually takes: a tile of few rows would
// otherwise wait for most of its memory.
template <bool kTangent, class T, class Acc, class Power>
LWKD_INLINE void add_rows(const Walk<kTangent, T, Power>& walk, int64_t count, int64_t width, Acc* sums,
                          Acc* tangent_sums) {
  constexpr int64_t kRows = kRowsAtATime<kTangent>;
  int64_t c = 0;
  // A power that calls into the maths library is bound by that call, not by memory.
  const int64_t in_blocks = Power::kCheap ? count : 0;
  for (; c + kRows <= in_blocks; c += kRows) {
    const Walk<kTangent, T, Power> block = walk.from(c, 0);
    for (int64_t n = 0; n < width; n += kSegment) {
      const int64_t end = std::min(n + kSegment, width);
      if (end - n == kSegment)
        for (int64_t k = 0; k < kRows; ++k) block.prefetch_segment(kRows + k, n);
      add_block<kRows>(block, n, end, sums, tangent_sums);
    }
  }
  for (; c < count; ++c) add_block<1>(walk.from(c, 0), 0, width, sums, tangent_sums);
}

template <class Acc>
LWKD_INLINE void fold_onto(Acc* __restrict map, const Acc* beside, int64_t fold, int64_t positions) {
  std::copy_n(beside, positions, map);
  for (int64_t k = 1; k < fold; ++k)
    for (int64_t n = 0; n < positions; ++n) map[n] += beside[k * positions + n];
}

// Positions adjacent: the rows of a tile are channels.
template <bool kTangent, class T, class Acc, class Power>
LWKD_INLINE void sum_channels(const Tile& tile, Acc* map, Acc* tangent_map, Power power) {
  const FeatureView &view = *tile.feature, &tangent = kTangent ? *tile.tangent : view;
  const Walk<kTangent, T, Power> walk = {rows_of<const T>(view, tile), rows_of<const T>(tangent, tile), power};
  const int64_t count = tile.range.size(), positions = view.positions;
  // Folded rows are summed beside the map and then folded onto it; the channels that fill no folded row follow.
  const bool adjacent = view.channel_stride == positions && tangent.channel_stride == positions;
  const int64_t fold = adjacent ? fold_of(view) : 1;
  const int64_t width = fold * positions, folded = count / fold;
  Acc beside[2 * kFoldedColumns], tangent_beside[kTangent ? 2 * kFoldedColumns : 1];
  Acc* sums = fold == 1 ? map : beside;
  Acc* tangent_sums = fold == 1 ? tangent_map : tangent_beside;
  std::fill_n(sums, width, Acc(0));
  if constexpr (kTangent) std::fill_n(tangent_sums, width, Acc(0));
  Walk<kTangent, T, Power> wide = walk;
  wide.rows.stride *= fold;
  wide.tangents.stride *= fold;
  constexpr int64_t kColumns = kTangent ? kTileColumns / 2 : kTileColumns;
  for (int64_t begin = 0; begin < width; begin += kColumns)
    add_rows(wide.from(0, begin), folded, std::min(kColumns, width - begin), sums + begin,
             kTangent ? tangent_sums + begin : nullptr);
  if (fold == 1) return;
  fold_onto(map, beside, fold, positions);
  if constexpr (kTangent) fold_onto(tangent_map, tangent_beside, fold, positions);
  add_rows(walk.from(folded * fold, 0), count - folded * fold, positions, map, tangent_map);
}

template <bool kTangent>
struct SumChannels {
  const Tile& tile;
  void *map, *tangent_map;

  template <class T, class Acc, class Power>
  LWKD_INLINE void run(Power power) const {
    sum_channels<kTangent, T>(tile, static_cast<Acc*>(map), static_cast<Acc*>(tangent_map), power);
  }
};

}  // namespace

LWKD_MULTIVERSION void sum_channels_of(const Tile& tile, void* map) {
  with_dtype(tile.feature->dtype, WithPower<SumChannels<false>>{tile.power, {tile, map, nullptr}});
}

LWKD_MULTIVERSION void sum_channels_of(const Tile& tile, void* map, void* tangent_map) {
  with_dtype(tile.feature->dtype, WithPower<SumChannels<true>>{tile.power, {tile, map, tangent_map}});
}

void sum_tile(const Tile& tile, void* map, void* tangent_map) {
  if (tile.feature->channels_last) {
    tile.tangent ? sum_positions_of(tile, map, tangent_map) : sum_positions_of(tile, map);
  } else {
    tile.tangent ? sum_channels_of(tile, map, tangent_map) : sum_channels_of(tile, map);
  }
}

Cut cut_sample(const FeatureView& view, int64_t tile_bytes) {
  const int64_t total = view.rows();
  const int64_t unit = view.channels_last ? 1 : kBlockRows * fold_of(view);
  const int64_t tiles = std::clamp<int64_t>(view.sample_bytes() / tile_bytes, 1, total);
  const int64_t step = ((total + tiles - 1) / tiles + unit - 1) / unit * unit;
  return {(total + step - 1) / step, step, total};
}

}  // namespace lwkd
