// How a feature (B, C, *spatial) lies in memory, seen as (B, C, N) with N the product of the spatial sizes.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <vector>

#include "gradient.h"

namespace lwkd {

struct FeatureView {
  char* data;  // never written through, except where the view is of a gradient
  at::ScalarType dtype;
  int64_t batch, channels, positions;
  int64_t batch_stride, channel_stride, position_stride;  // in elements
  bool channels_last;                                     // channels adjacent; otherwise positions are

  char* sample(int64_t b) const { return data + b * batch_stride * item_bytes(); }
  int64_t item_bytes() const { return static_cast<int64_t>(c10::elementSize(dtype)); }
  int64_t sample_bytes() const { return channels * positions * item_bytes(); }
};

// Accumulation dtype: float32, or float64 for float64.
inline at::ScalarType accumulation(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

inline int64_t positions_of(const at::Tensor& feature) {
  int64_t positions = 1;
  for (int64_t d = 2; d < feature.dim(); ++d) positions *= feature.size(d);
  return positions;
}

// Whether the kernels can walk the tensor where it is: its spatial dimensions collapse into one, and either
// positions or channels are adjacent. Fills the view if so.
inline bool view_in_place(const at::Tensor& feature, FeatureView& view) {
  int64_t position_stride = 1, expected = -1;
  for (int64_t d = feature.dim() - 1; d >= 2; --d) {
    if (feature.size(d) == 1) continue;
    if (expected < 0) {
      position_stride = feature.stride(d);
    } else if (feature.stride(d) != expected) {
      return false;
    }
    expected = feature.stride(d) * feature.size(d);
  }
  const int64_t positions = positions_of(feature), channels = feature.size(1);
  const bool positions_adjacent = position_stride == 1 && positions > 1;
  const bool channels_adjacent = feature.stride(1) == 1 || channels == 1;
  if (!positions_adjacent && !channels_adjacent && positions > 1) return false;
  view = {static_cast<char*>(const_cast<void*>(feature.const_data_ptr())),
          feature.scalar_type(),
          feature.size(0),
          channels,
          positions,
          feature.stride(0),
          feature.stride(1),
          position_stride,
          channels_adjacent && !positions_adjacent};
  return true;
}

// A view of the feature in an accumulable form: the tensor itself where it can be walked in place, else a
// contiguous copy, which `keep` holds alive.
inline FeatureView readable(const at::Tensor& feature, at::ScalarType acc, at::Tensor& keep) {
  FeatureView view;
  keep = feature;
  if ((feature.scalar_type() == at::kDouble) != (acc == at::kDouble)) keep = feature.to(acc);
  if (view_in_place(keep, view)) return view;
  keep = keep.contiguous();
  TORCH_INTERNAL_ASSERT(view_in_place(keep, view));
  return view;
}

// An empty tensor of a feature's shape in which channels, or else positions, are adjacent.
inline at::Tensor empty_in_layout(const at::Tensor& feature, at::ScalarType dtype, bool channels_last) {
  const auto options = at::TensorOptions().dtype(dtype);
  std::vector<int64_t> sizes = feature.sizes().vec();
  if (!channels_last) return at::empty(sizes, options);
  sizes.erase(sizes.begin() + 1);
  sizes.push_back(feature.size(1));
  return at::empty(sizes, options).movedim(-1, 1);
}

// A view of another tensor of the feature's shape that is walked in step with it: the tensor itself where it has the
// same dtype and adjacent dimension, else a copy, which `keep` holds alive.
inline FeatureView readable_beside(const FeatureView& feature, const at::Tensor& other, at::Tensor& keep) {
  FeatureView view;
  keep = other;
  if (other.scalar_type() == feature.dtype && view_in_place(other, view) && view.channels_last == feature.channels_last)
    return view;
  keep = empty_in_layout(other, feature.dtype, feature.channels_last).copy_(other);
  TORCH_INTERNAL_ASSERT(view_in_place(keep, view));
  view.channels_last = feature.channels_last;  // with one channel or one position the two forms look alike
  return view;
}

// The gradient of a feature, and the view through which it is written in step with the feature.
struct Gradient : WrittenGradient {
  FeatureView view;

  Gradient(const at::Tensor& of, const FeatureView& feature) : WrittenGradient(of) {
    if (result.scalar_type() == feature.dtype && view_in_place(result, view) &&
        view.channels_last == feature.channels_last)
      return;
    written = empty_in_layout(of, feature.dtype, feature.channels_last);
    TORCH_INTERNAL_ASSERT(view_in_place(written, view));
    view.channels_last = feature.channels_last;
  }
};

}  // namespace lwkd
