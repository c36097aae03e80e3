// How a feature (B, C, *spatial) lies in memory, and which features the attention kernels read where they are.
// Legend: B C N batch, channels, map positions of one feature; V elements in 16 bytes.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "../memory_layout.h"
#include "../spatial_size.h"

namespace lwkd::cuda {

constexpr int64_t kMostPartials = 16;  // of one map: they are read back one after another
constexpr int64_t kTileColumns = 128;  // of a channels-first feature: one warp reads 512 contiguous bytes of float32

// What a kernel must know of a feature beside its address.
struct Geometry {
  int64_t samples, channels, positions;
  Size3 size;  // spatial, leading ones included
  at::ScalarType dtype;
  bool channels_last;
  int64_t sample_stride;

  int64_t item_bytes() const { return static_cast<int64_t>(c10::elementSize(dtype)); }
  int64_t vector() const { return 16 / item_bytes(); }

  // The number k of channels that are seen as one row, so that C rows of N columns become C/k rows of k*N: more than
  // one only in channels-first features, to fill the tile's columns and to make rows divisible by V. The partial map of
  // such a row holds k maps of N.
  int64_t fold() const;

  // Rows and columns of one sample as it lies in memory.
  int64_t rows() const { return channels_last ? positions : channels / fold(); }
  int64_t columns() const { return channels_last ? channels : fold() * positions; }

  // Whether every row of every sample starts at a multiple of V elements.
  bool wide() const { return columns() % vector() == 0 && sample_stride % vector() == 0; }

  void add_to(std::vector<int64_t>& key) const;
};

// Features as the kernels read them: where they are if samples are dense, channels first or last, whatever the stride
// of the batch (a token sequence without its class token is one such); else from a contiguous copy.
struct Features {
  std::vector<at::Tensor> tensors;
  std::vector<Geometry> geometries;

  void add(const at::Tensor& feature);
};

// A feature and its tangent with equal strides: as they are, or both copied.
void add_matched(const at::Tensor& feature, const at::Tensor& tangent, Features& features, Features& tangents);

// The gradient of a feature; what the kernels write of it is dense, in the memory order in which the feature is read.
struct FeatureGradient : WrittenGradient {
  FeatureGradient(const at::Tensor& of, const Geometry& read);
};

}  // namespace lwkd::cuda
