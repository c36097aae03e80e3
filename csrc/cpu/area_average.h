// Area average of a map from one spatial size to another (adaptive average pooling), and its transpose. Both only copy
// where the sizes are equal.

#pragma once

#include <algorithm>
#include <cstdint>

#include "../spatial_size.h"

namespace lwkd {

// The source positions that are averaged for one target position, in one dimension.
struct Bin {
  int64_t begin, end;
};

inline Bin bin_of(int64_t index, int64_t from, int64_t to) {
  return {index * from / to, ((index + 1) * from + to - 1) / to};
}

// Calls visit(target position, source position, 1 / positions in the bin) for all pairs, in a fixed order.
template <class Acc, class Visit>
inline void visit_bins(const Size3& from, const Size3& to, const Visit& visit) {
  for (int64_t z = 0; z < to[0]; ++z) {
    const Bin bz = bin_of(z, from[0], to[0]);
    for (int64_t y = 0; y < to[1]; ++y) {
      const Bin by = bin_of(y, from[1], to[1]);
      for (int64_t x = 0; x < to[2]; ++x) {
        const Bin bx = bin_of(x, from[2], to[2]);
        const Acc share = Acc(1) / Acc((bz.end - bz.begin) * (by.end - by.begin) * (bx.end - bx.begin));
        const int64_t target = (z * to[1] + y) * to[2] + x;
        for (int64_t i = bz.begin; i < bz.end; ++i)
          for (int64_t j = by.begin; j < by.end; ++j)
            for (int64_t k = bx.begin; k < bx.end; ++k) visit(target, (i * from[1] + j) * from[2] + k, share);
      }
    }
  }
}

template <class Acc>
inline void area_average(const Acc* map, const Size3& from, Acc* resized, const Size3& to) {
  if (from == to) {
    std::copy_n(map, positions_of(to), resized);
    return;
  }
  std::fill_n(resized, positions_of(to), Acc(0));
  visit_bins<Acc>(from, to, [&](int64_t target, int64_t source, Acc share) { resized[target] += share * map[source]; });
}

// Gradient of the resized map -> gradient of the map.
template <class Acc>
inline void area_average_transposed(const Acc* grad_resized, const Size3& to, Acc* grad_map, const Size3& from) {
  if (from == to) {
    std::copy_n(grad_resized, positions_of(from), grad_map);
    return;
  }
  std::fill_n(grad_map, positions_of(from), Acc(0));
  visit_bins<Acc>(from, to,
                  [&](int64_t target, int64_t source, Acc share) { grad_map[source] += share * grad_resized[target]; });
}

}  // namespace lwkd
