// A pair of derivatives as it is walked, and its gradients as they are written, on any device.

#pragma once

#include "memory_layout.h"

namespace lwkd {

// One dtype, dense, the same strides. Each side is the tensor itself where that holds; one side is copied into the
// other's layout or wider dtype, and both only where neither is dense.
struct Pair {
  at::Tensor a, b;

  Pair(const at::Tensor& student, const at::Tensor& teacher) {
    const at::ScalarType dtype = c10::promoteTypes(student.scalar_type(), teacher.scalar_type());
    a = student.to(dtype);
    b = teacher.to(dtype);
    if (!a.is_non_overlapping_and_dense()) a = b.is_non_overlapping_and_dense() ? in_layout_of(b, a) : a.contiguous();
    if (!same_strides(a, b) || !b.is_non_overlapping_and_dense()) b = in_layout_of(a, b);
  }
};

// The gradient of one side, written straight into place where that side is walked in its own dtype and layout.
struct PairGradient : WrittenGradient {
  PairGradient(const at::Tensor& of, const at::Tensor& walked) : WrittenGradient(of) {
    if (result.scalar_type() != walked.scalar_type() || !same_strides(result, walked)) written = at::empty_like(walked);
  }
};

}  // namespace lwkd
