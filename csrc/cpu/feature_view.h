// How a feature (B, C, *spatial) lies in memory, seen as (B, C, N) with N the product of the spatial sizes.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "../memory_layout.h"
#include "../spatial_size.h"
#include "dtypes.h"
#include "huge_pages.h"

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

  // A sample is walked in rows of adjacent elements: one for each channel, or for each position with channels last.
  int64_t rows() const { return channels_last ? positions : channels; }
  int64_t row_stride() const { return channels_last ? position_stride : channel_stride; }
};

// Whether the loops can walk the tensor where it is: its spatial dimensions collapse into one, and either positions or
// channels are adjacent. Fills the view if so.
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

// A view of a feature that is accumulated in acc: of the tensor itself where it can be walked in place, else of a
// contiguous copy. `keep` holds what is viewed alive.
inline FeatureView readable(const at::Tensor& feature, at::ScalarType acc, at::Tensor& keep) {
  FeatureView view;
  keep = feature;
  if ((feature.scalar_type() == at::kDouble) != (acc == at::kDouble)) keep = feature.to(acc);
  if (view_in_place(keep, view)) return view;
  keep = keep.contiguous();
  TORCH_INTERNAL_ASSERT(view_in_place(keep, view));
  return view;
}

// Whether another tensor of the feature's shape can be walked in step with it where it is: it has the same dtype and
// adjacent dimension. Fills the view if so.
inline bool view_beside(const FeatureView& feature, const at::Tensor& other, FeatureView& view) {
  return other.scalar_type() == feature.dtype && view_in_place(other, view) &&
         view.channels_last == feature.channels_last;
}

// An empty tensor of that shape that can be, and its view.
inline at::Tensor empty_beside(const FeatureView& feature, const at::Tensor& other, FeatureView& view) {
  at::Tensor empty = empty_in_layout(other, feature.dtype, feature.channels_last);
  TORCH_INTERNAL_ASSERT(view_in_place(empty, view));
  view.channels_last = feature.channels_last;  // with one channel or one position the two layouts look alike
  return empty;
}

// A view of a tensor that is walked in step with the feature: of the tensor itself, or of a copy, which `keep` holds
// alive.
inline FeatureView readable_beside(const FeatureView& feature, const at::Tensor& other, at::Tensor& keep) {
  FeatureView view;
  keep = other;
  if (!view_beside(feature, other, view)) keep = empty_beside(feature, other, view).copy_(other);
  return view;
}

// The gradient of a feature, and the view through which it is written in step with the feature.
struct FeatureGradient : WrittenGradient {
  FeatureView view;

  FeatureGradient(const at::Tensor& of, const FeatureView& feature) : WrittenGradient(of) {
    if (!view_beside(feature, result, view)) written = empty_beside(feature, of, view);
    prefer_huge_pages(written);
  }
};

}  // namespace lwkd
