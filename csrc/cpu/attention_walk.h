// The rows of one tile, and of the tangent beside them: what the loops of sum_tile and scale_tile go over.

#pragma once

#include "attention_tiles.h"

namespace lwkd {

constexpr int64_t kSegment = 64;  // columns between two prefetches

template <class T>
struct Rows {
  T* first;  // of a constant type where rows are only read
  int64_t stride;

  LWKD_INLINE T* at(int64_t row) const { return first + row * stride; }
  LWKD_INLINE Rows from(int64_t row, int64_t column) const { return {at(row) + column, stride}; }
};

template <class T>
LWKD_INLINE Rows<T> rows_of(const FeatureView& view, const Tile& tile) {
  return Rows<T>{reinterpret_cast<T*>(view.sample(tile.sample)), view.row_stride()}.from(tile.range.begin, 0);
}

// The rows of a feature and, if kTangent, of its tangent beside them, which are walked together.
template <bool kTangent, class T, class Power>
struct Walk {
  Rows<const T> rows, tangents;
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
  LWKD_INLINE static void prefetch_line_by_line(const Rows<const T>& of, int64_t row, int64_t column) {
    const uintptr_t segment = reinterpret_cast<uintptr_t>(of.first) + (row * of.stride + column) * sizeof(T);
    for (size_t byte = 0; byte < kSegment * sizeof(T); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(segment + byte), 0, 2);
  }
};

// The quarters of sum_tile: positions adjacent (attention_tiles.cpp) or channels (attention_tiles_channels_last.cpp),
// without and with a tangent. A compiler's time grows faster than the function that it works on.
void sum_channels_of(const Tile& tile, void* map);
void sum_channels_of(const Tile& tile, void* map, void* tangent_map);
void sum_positions_of(const Tile& tile, void* map);
void sum_positions_of(const Tile& tile, void* map, void* tangent_map);

}  // namespace lwkd
