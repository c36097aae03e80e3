// A gradient in the dtype and layout of what it is the gradient of, and what is written of it: the same tensor, or one
// in the form in which it is walked, from which finish() copies.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <vector>

namespace lwkd {

struct WrittenGradient {
  at::Tensor result, written;

  explicit WrittenGradient(const at::Tensor& of) : result(at::empty_like(of)), written(result) {}

  at::Tensor finish() const { return written.is_same(result) ? result : result.copy_(written); }
};

template <class AnyGradient>
std::vector<at::Tensor> finished(const std::vector<AnyGradient>& gradients) {
  std::vector<at::Tensor> results;
  results.reserve(gradients.size());
  for (const AnyGradient& gradient : gradients) results.push_back(gradient.finish());
  return results;
}

}  // namespace lwkd
