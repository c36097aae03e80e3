#include "attention_tiles.h"

#include <algorithm>
#include <cstring>

#include "clones.h"
#include "powers.h"
#include "tile_dispatch.h"

namespace lwkd {
namespace {

constexpr int64_t kSegment = 64;  // columns between two prefetches

template <class T>
LWKD_INLINE void prefetch_segment(const T* row) {
  const char* line = reinterpret_cast<const char*>(row);
  for (size_t byte = 0; byte < kSegment * sizeof(T); byte += 64) __builtin_prefetch(line + byte, 0, 2);
}

template <class T, class Acc, class Power>
LWKD_INLINE void add_to(Acc* __restrict sums, const T* row, int64_t width, Power power) {
  for (int64_t n = 0; n < width; ++n) sums[n] += power.value(Acc(row[n]));
}

template <class T, class Acc, class Power>
LWKD_INLINE void add_block(const T* r, int64_t stride, int64_t begin, int64_t end, Acc* __restrict sums, Power power) {
#pragma GCC unroll 1
  for (int64_t n = begin; n < end; ++n) {
    const Acc s01 = power.value(Acc(r[n])) + power.value(Acc(r[stride + n]));
    const Acc s23 = power.value(Acc(r[2 * stride + n])) + power.value(Acc(r[3 * stride + n]));
    const Acc s45 = power.value(Acc(r[4 * stride + n])) + power.value(Acc(r[5 * stride + n]));
    const Acc s67 = power.value(Acc(r[6 * stride + n])) + power.value(Acc(r[7 * stride + n]));
    sums[n] += (s01 + s23) + (s45 + s67);
  }
}

// sums[n] += sum over rows, eight rows at a time, the next eight on their way into the second-level cache.
template <class T, class Acc, class Power>
LWKD_INLINE void add_rows(const T* rows, int64_t stride, int64_t count, int64_t width, Acc* __restrict sums,
                          Power power) {
  int64_t c = 0;
  // A power that calls into the maths library is bound by that call, not by memory.
  const int64_t in_blocks = Power::kCheap ? count : 0;
  for (; c + kBlockRows <= in_blocks; c += kBlockRows) {
    const T* r = rows + c * stride;
    const int64_t ahead = std::min(count - c - kBlockRows, kBlockRows);
    for (int64_t n = 0; n < width; n += kSegment) {
      const int64_t end = std::min(n + kSegment, width);
      if (end - n == kSegment)
        for (int64_t k = 0; k < ahead; ++k) prefetch_segment(r + (kBlockRows + k) * stride + n);
      add_block(r, stride, n, end, sums, power);
    }
  }
  for (; c < count; ++c) add_to(sums, rows + c * stride, width, power);
}

template <class T, class Acc, class Power>
LWKD_INLINE void add_tangent_rows(const T* rows, int64_t stride, const T* tangents, int64_t tangent_stride,
                                  int64_t count, int64_t width, Acc* __restrict sums, Acc* __restrict tangent_sums,
                                  Power power) {
  for (int64_t c = 0; c < count; ++c) {
    const T *r = rows + c * stride, *t = tangents + c * tangent_stride;
    for (int64_t n = 0; n < width; ++n) {
      sums[n] += power.value(Acc(r[n]));
      tangent_sums[n] += power.slope(Acc(r[n])) * Acc(t[n]);
    }
  }
}

// Positions adjacent: the rows of a tile are channels.
template <class T, class Acc, class Power>
LWKD_INLINE void sum_channels(const Tile& tile, Acc* map, Acc* tangent_map, Power power) {
  const FeatureView& view = *tile.feature;
  const T* rows = reinterpret_cast<const T*>(view.sample(tile.sample)) + tile.range.begin * view.channel_stride;
  const int64_t count = tile.range.size(), positions = view.positions;
  if (tile.tangent) {
    std::fill_n(map, positions, Acc(0));
    std::fill_n(tangent_map, positions, Acc(0));
    const FeatureView& moved = *tile.tangent;
    const T* tangents = reinterpret_cast<const T*>(moved.sample(tile.sample)) + tile.range.begin * moved.channel_stride;
    add_tangent_rows(rows, view.channel_stride, tangents, moved.channel_stride, count, positions, map, tangent_map,
                     power);
    return;
  }
  // Folded rows are summed beside the map and then folded onto it; the channels that fill no folded row follow.
  const int64_t fold = view.channel_stride == positions ? fold_of(view) : 1;
  const int64_t width = fold * positions, folded = count / fold, stride = fold * view.channel_stride;
  Acc beside[2 * kFoldedColumns];
  Acc* sums = fold == 1 ? map : beside;
  std::fill_n(sums, width, Acc(0));
  for (int64_t begin = 0; begin < width; begin += kTileColumns)
    add_rows(rows + begin, stride, folded, std::min(kTileColumns, width - begin), sums + begin, power);
  if (fold == 1) return;
  std::fill_n(map, positions, Acc(0));
  for (int64_t k = 0; k < fold; ++k) add_to(map, sums + k * positions, positions, Identity{});
  for (int64_t c = folded * fold; c < count; ++c) add_to(map, rows + c * positions, positions, power);
}

// Eight numbers in one or two vector registers, whatever the machine: an array of sums would live in memory.
template <class Acc>
struct Eight {
  typedef Acc type __attribute__((vector_size(8 * sizeof(Acc))));
};

template <class T, class Acc, class Power>
LWKD_INLINE void add_eight(const T* row, typename Eight<Acc>::type& sums, Power power) {
  Acc values[8];
  for (int j = 0; j < 8; ++j) values[j] = power.value(Acc(row[j]));
  typename Eight<Acc>::type added;
  std::memcpy(&added, values, sizeof added);
  sums += added;
}

template <class T, class Acc, class Power>
LWKD_INLINE Acc sum_row(const T* row, int64_t count, Power power) {
  typename Eight<Acc>::type even = {}, odd = {};
  int64_t c = 0;
  for (; c + 16 <= count; c += 16) {
    add_eight<T, Acc>(row + c, even, power);
    add_eight<T, Acc>(row + c + 8, odd, power);
  }
  Acc rest = 0;
  for (; c < count; ++c) rest += power.value(Acc(row[c]));
  even += odd;
  return (((even[0] + even[4]) + (even[2] + even[6])) + ((even[1] + even[5]) + (even[3] + even[7]))) + rest;
}

// Channels adjacent: the rows of a tile are positions.
template <class T, class Acc, class Power>
LWKD_INLINE void sum_positions(const Tile& tile, Acc* map, Acc* tangent_map, Power power) {
  const FeatureView& view = *tile.feature;
  const T* sample = reinterpret_cast<const T*>(view.sample(tile.sample));
  const int64_t channels = view.channels;
  for (int64_t n = tile.range.begin; n < tile.range.end; ++n) {
    map[n] = sum_row<T, Acc>(sample + n * view.position_stride, channels, power);
  }
  if (!tile.tangent) return;
  const FeatureView& moved = *tile.tangent;
  const T* tangents = reinterpret_cast<const T*>(moved.sample(tile.sample));
  for (int64_t n = tile.range.begin; n < tile.range.end; ++n) {
    const T *row = sample + n * view.position_stride, *tangent = tangents + n * moved.position_stride;
    Acc lanes[8] = {};
    int64_t c = 0;
    for (; c + 8 <= channels; c += 8)
      for (int j = 0; j < 8; ++j) lanes[j] += power.slope(Acc(row[c + j])) * Acc(tangent[c + j]);
    for (int j = 0; c + j < channels; ++j) lanes[j] += power.slope(Acc(row[c + j])) * Acc(tangent[c + j]);
    tangent_map[n] = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
  }
}

struct SumTile {
  const Tile& tile;
  void *map, *tangent_map;

  template <class T, class Acc, class Power>
  LWKD_INLINE void run(Power power) const {
    Acc *sums = static_cast<Acc*>(map), *tangent_sums = static_cast<Acc*>(tangent_map);
    if (tile.feature->channels_last) {
      sum_positions<T>(tile, sums, tangent_sums, power);
    } else {
      sum_channels<T>(tile, sums, tangent_sums, power);
    }
  }
};

}  // namespace

LWKD_CLONES void sum_tile(const Tile& tile, void* map, void* tangent_map) {
  with_dtype(tile.feature->dtype, tile.power, SumTile{tile, map, tangent_map});
}

Cut cut_sample(const FeatureView& view, int64_t tile_bytes) {
  const int64_t total = view.channels_last ? view.positions : view.channels;
  const int64_t unit = view.channels_last ? 1 : kBlockRows * fold_of(view);
  const int64_t tiles = std::clamp<int64_t>(view.sample_bytes() / tile_bytes, 1, total);
  const int64_t step = ((total + tiles - 1) / tiles + unit - 1) / unit * unit;
  return {(total + step - 1) / step, step, total};
}

}  // namespace lwkd
