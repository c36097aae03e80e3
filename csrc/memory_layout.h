// How tensors lie in memory: copies in the layout of another tensor, and gradients, which lie as the tensor they belong
// to but are written in the layout in which an op walks.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cstdint>
#include <vector>

namespace lwkd {

// Of tensors of one shape; the stride of a dimension of size 1 does not matter.
inline bool same_strides(const at::Tensor& one, const at::Tensor& other) {
  for (int64_t d = 0; d < one.dim(); ++d)
    if (one.size(d) > 1 && one.stride(d) != other.stride(d)) return false;
  return true;
}

// A copy of t that lies as the model does, in its own dtype.
inline at::Tensor in_layout_of(const at::Tensor& model, const at::Tensor& t) {
  return at::empty_like(model, t.options().memory_format(at::MemoryFormat::Preserve)).copy_(t);
}

inline at::Tensor empty_contiguous(const at::Tensor& like) { return at::empty(like.sizes(), like.options()); }

// An empty tensor of a feature's shape in which channels, or else positions, are adjacent.
inline at::Tensor empty_in_layout(const at::Tensor& feature, at::ScalarType dtype, bool channels_last) {
  const auto options = feature.options().dtype(dtype);
  if (!channels_last) return at::empty(feature.sizes(), options);
  std::vector<int64_t> sizes = feature.sizes().vec();
  sizes.erase(sizes.begin() + 1);
  sizes.push_back(feature.size(1));
  return at::empty(sizes, options).movedim(-1, 1);
}

// The gradient of a tensor, in its dtype and layout. An op writes `written`: the result itself, or a tensor in the
// layout in which it walks, which finish() copies into the result.
struct WrittenGradient {
  at::Tensor result, written;

  explicit WrittenGradient(const at::Tensor& of) : result(at::empty_like(of)), written(result) {}

  at::Tensor finish() const { return written.is_same(result) ? result : result.copy_(written); }
};

// The gradients of all layers, and the list of what is written of them.
template <class Gradient>
struct Gradients {
  std::vector<Gradient> all;
  std::vector<at::Tensor> written;

  // walked: what the gradient's constructor asks for of the tensor as the op walks it.
  template <class Walked>
  const Gradient& add(const at::Tensor& of, const Walked& walked) {
    written.push_back(all.emplace_back(of, walked).written);
    return all.back();
  }

  std::vector<at::Tensor> finish() const {
    std::vector<at::Tensor> results;
    results.reserve(all.size());
    for (const Gradient& gradient : all) results.push_back(gradient.finish());
    return results;
  }
};

}  // namespace lwkd
