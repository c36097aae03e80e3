// Dtypes known at run time: in which one each is accumulated, and the code that is compiled for it.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "multiversion.h"

namespace lwkd {

// float32, or float64 for float64.
inline at::ScalarType accumulation(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

// job(T(), Acc()): the dtype, and the one in which it is accumulated.
template <class Job>
LWKD_INLINE void with_dtype(at::ScalarType dtype, const Job& job) {
  if (dtype == at::kFloat) return job(float(), float());
  if (dtype == at::kHalf) return job(c10::Half(), float());
  if (dtype == at::kBFloat16) return job(c10::BFloat16(), float());
  job(double(), double());
}

// job(Acc()): only the dtype in which a dtype is accumulated.
template <class Job>
auto with_accumulation(at::ScalarType dtype, const Job& job) {
  return dtype == at::kDouble ? job(double()) : job(float());
}

// A result that was formed in float64: kept so, or rounded to float32.
inline at::Tensor as_tensor(const std::vector<double>& values, at::ScalarType dtype) {
  at::Tensor result = at::empty({static_cast<int64_t>(values.size())}, dtype);
  with_accumulation(
      dtype, [&](auto acc) { std::copy(values.begin(), values.end(), result.mutable_data_ptr<decltype(acc)>()); });
  return result;
}

}  // namespace lwkd
