#include "attention_tiles.h"

#include <algorithm>
#include <cstring>

#include "simd8.h"

namespace lwkd {
namespace {

constexpr int64_t kSegment = 64;  // columns between two prefetches

template <class T>
struct Rows {
  const T* first;
  int64_t stride;

  LWKD_INLINE const T* at(int64_t row) const { return first + row * stride; }
  LWKD_INLINE Rows from(int64_t row, int64_t column) const { return {at(row) + column, stride}; }
};

template <class T>
LWKD_INLINE Rows<T> rows_of(const FeatureView& view, const Tile& tile) {
  return Rows<T>{reinterpret_cast<const T*>(view.sample(tile.sample)), view.row_stride()}.from(tile.range.begin, 0);
}

// The rows of a feature and, if kTangent, of its tangent beside them, which are walked together.
template <bool kTangent, class T, class Power>
struct Walk {
  Rows<T> rows, tangents;
  Power power;

  LWKD_INLINE Walk from(int64_t row, int64_t column) const {
    return {rows.from(row, column), tangents.from(row, column), power};
  }

  // What the first row adds to the map, and to its tangent.
  template <class Acc>
  LWKD_INLINE Acc value(int64_t column) const {
    return power.value(Acc(rows.first[column]));
  }
  template <class Acc>
  LWKD_INLINE Acc tangent(int64_t column) const {
    return power.slope(Acc(rows.first[column])) * Acc(tangents.first[column]);
  }

  // The row may lie past the end of the feature: an address is only fetched ahead there, never read.
  LWKD_INLINE void prefetch_segment(int64_t row, int64_t column) const {
    prefetch_line_by_line(rows, row, column);
    if constexpr (kTangent) prefetch_line_by_line(tangents, row, column);
  }

 private:
  LWKD_INLINE static void prefetch_line_by_line(const Rows<T>& of, int64_t row, int64_t column) {
    const uintptr_t segment = reinterpret_cast<uintptr_t>(of.first) + (row * of.stride + column) * sizeof(T);
    for (size_t byte = 0; byte < kSegment * sizeof(T); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(segment + byte), 0, 2);
  }
};

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
LWKD_INLINE void add_block(Rows<T> rows, int64_t begin, int64_t end, Acc* __restrict sums, Power power) {
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
LWKD_INLINE void add_block(Rows<T> rows, Rows<T> tangents, int64_t begin, int64_t end, Acc* __restrict sums,
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
  const Walk<kTangent, T, Power> walk = {rows_of<T>(view, tile), rows_of<T>(tangent, tile), power};
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

// Sums over the channels of one position, in eight lanes; the last channels, which do not fill them, are left out.
template <bool kTangent, class T, class Acc, class Power>
LWKD_INLINE void sum_row(const Walk<kTangent, T, Power>& row, int64_t channels, Simd8<Acc>& sums,
                         Simd8<Acc>& tangent_sums) {
  Simd8<Acc> odd = {}, tangent_odd = {};
  sums = tangent_sums = odd;
  const auto add = [&](const Simd8<Acc>& x, const Simd8<Acc>& dx, Simd8<Acc>& to, Simd8<Acc>& tangent_to) {
    Simd8<Acc> added;
    fill8<Acc>(added, [&](int j) { return row.power.value(x[j]); });
    to += added;
    if constexpr (kTangent) {
      fill8<Acc>(added, [&](int j) { return row.power.slope(x[j]) * dx[j]; });
      tangent_to += added;
    }
  };
  Simd8<Acc> x, y, dx = {}, dy = {};
  int64_t c = 0;
  for (; c + 16 <= channels; c += 16) {
    load16<T, Acc>(row.rows.first + c, x, y);
    if constexpr (kTangent) load16<T, Acc>(row.tangents.first + c, dx, dy);
    add(x, dx, sums, tangent_sums);
    add(y, dy, odd, tangent_odd);
  }
  if (c + 8 <= channels) {
    load8<T, Acc>(row.rows.first + c, x);
    if constexpr (kTangent) load8<T, Acc>(row.tangents.first + c, dx);
    add(x, dx, sums, tangent_sums);
  }
  sums += odd;
  if constexpr (kTangent) tangent_sums += tangent_odd;
}

// Channels adjacent: the rows of a tile are positions, eight of which are summed together.
template <bool kTangent, class T, class Acc, class Power>
LWKD_INLINE void sum_positions(const Tile& tile, Acc* map, Acc* tangent_map, Power power) {
  const FeatureView &view = *tile.feature, &tangent = kTangent ? *tile.tangent : view;
  const Walk<kTangent, T, Power> walk = {rows_of<T>(view, tile), rows_of<T>(tangent, tile), power};
  const int64_t channels = view.channels, first = tile.range.begin, positions = tile.range.size();
  for (int64_t n = 0; n < positions; n += 8) {
    const int64_t count = std::min<int64_t>(8, positions - n);
    // The last position stands in for those that are missing.
    const auto row = [&](int64_t k) { return walk.from(n + std::min(k, count - 1), 0); };
    Simd8<Acc> sums[8], tangent_sums[8], added;
    if (channels >= 8) {
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) sum_row<kTangent, T, Acc>(row(k), channels, sums[k], tangent_sums[k]);
      add_up_rows(sums);
      if constexpr (kTangent) add_up_rows(tangent_sums);
    } else {
      sums[0] = tangent_sums[0] = Simd8<Acc>{};
    }
    for (int64_t c = channels / 8 * 8; c < channels; ++c) {
      fill8<Acc>(added, [&](int k) { return row(k).template value<Acc>(c); });
      sums[0] += added;
      if constexpr (kTangent) {
        fill8<Acc>(added, [&](int k) { return row(k).template tangent<Acc>(c); });
        tangent_sums[0] += added;
      }
    }
    std::memcpy(map + first + n, &sums[0], count * sizeof(Acc));
    if constexpr (kTangent) std::memcpy(tangent_map + first + n, &tangent_sums[0], count * sizeof(Acc));
  }
}

struct SumTile {
  const Tile& tile;
  void *map, *tangent_map;

  template <class T, class Acc, class Power>
  LWKD_INLINE void run(Power power) const {
    Acc *sums = static_cast<Acc*>(map), *tangent_sums = static_cast<Acc*>(tangent_map);
    if (tile.tangent) {
      sum<true, T>(sums, tangent_sums, power);
    } else {
      sum<false, T>(sums, tangent_sums, power);
    }
  }

  template <bool kTangent, class T, class Acc, class Power>
  LWKD_INLINE void sum(Acc* sums, Acc* tangent_sums, Power power) const {
    if (tile.feature->channels_last) {
      sum_positions<kTangent, T>(tile, sums, tangent_sums, power);
    } else {
      sum_channels<kTangent, T>(tile, sums, tangent_sums, power);
    }
  }
};

}  // namespace

LWKD_MULTIVERSION void sum_tile(const Tile& tile, void* map, void* tangent_map) {
  with_dtype(tile.feature->dtype, WithPower<SumTile>{tile.power, {tile, map, tangent_map}});
}

Cut cut_sample(const FeatureView& view, int64_t tile_bytes) {
  const int64_t total = view.rows();
  const int64_t unit = view.channels_last ? 1 : kBlockRows * fold_of(view);
  const int64_t tiles = std::clamp<int64_t>(view.sample_bytes() / tile_bytes, 1, total);
  const int64_t step = ((total + tiles - 1) / tiles + unit - 1) / unit * unit;
  return {(total + step - 1) / step, step, total};
}

}  // namespace lwkd
