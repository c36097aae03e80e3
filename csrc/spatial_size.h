// The spatial size of a feature or a map, always in three dimensions: those that it lacks are ones in front.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <array>
#include <cstdint>

namespace lwkd {

using Size3 = std::array<int64_t, 3>;

inline Size3 padded(at::IntArrayRef spatial) {
  Size3 size = {1, 1, 1};
  std::copy(spatial.begin(), spatial.end(), size.end() - spatial.size());
  return size;
}

inline int64_t positions_of(const Size3& size) { return size[0] * size[1] * size[2]; }

inline int64_t positions_of(const at::Tensor& feature) { return c10::multiply_integers(feature.sizes().slice(2)); }

// The size at which the maps of student and teacher are compared.
inline Size3 smaller_of(const Size3& student, const Size3& teacher) {
  return {std::min(student[0], teacher[0]), std::min(student[1], teacher[1]), std::min(student[2], teacher[2])};
}

}  // namespace lwkd
