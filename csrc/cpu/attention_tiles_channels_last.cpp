// sum_tile for features with channels adjacent.

#include <algorithm>
#include <cstring>

#include "attention_walk.h"
#include "simd8.h"

namespace lwkd {
namespace {

// Rows follow each other in memory, and the processor fetches ahead by itself, but not over the end of a page.
constexpr int64_t kBytesAhead = 4096;

template <class T>
LWKD_INLINE void prefetch_ahead(const T* at) {
  __builtin_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(at) + kBytesAhead), 0, 2);
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
    prefetch_ahead(row.rows.first + c);
    load16<T, Acc>(row.rows.first + c, x, y);
    if constexpr (kTangent) {
      prefetch_ahead(row.tangents.first + c);
      load16<T, Acc>(row.tangents.first + c, dx, dy);
    }
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
  const Walk<kTangent, T, Power> walk = {rows_of<const T>(view, tile), rows_of<const T>(tangent, tile), power};
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

template <bool kTangent>
struct SumPositions {
  const Tile& tile;
  void *map, *tangent_map;

  template <class T, class Acc, class Power>
  LWKD_INLINE void run(Power power) const {
    sum_positions<kTangent, T>(tile, static_cast<Acc*>(map), static_cast<Acc*>(tangent_map), power);
  }
};

}  // namespace

LWKD_MULTIVERSION void sum_positions_of(const Tile& tile, void* map) {
  with_dtype(tile.feature->dtype, WithPower<SumPositions<false>>{tile.power, {tile, map, nullptr}});
}

LWKD_MULTIVERSION void sum_positions_of(const Tile& tile, void* map, void* tangent_map) {
  with_dtype(tile.feature->dtype, WithPower<SumPositions<true>>{tile.power, {tile, map, tangent_map}});
}

}  // namespace lwkd
