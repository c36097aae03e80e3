// From run-time dtype and power to the loop compiled for them: job.run<T, Acc>(power).

#pragma once

#include <c10/core/ScalarType.h>

#include "attention_tiles.h"
#include "clones.h"
#include "powers.h"

namespace lwkd {

template <class T, class Acc, class Job>
LWKD_INLINE void with_power(double power, const Job& job) {
  if (power == 2) return job.template run<T, Acc>(Square{});
  if (power == 1) return job.template run<T, Acc>(Magnitude{});
  if (power == kIdentityPower) return job.template run<T, Acc>(Identity{});
  job.template run<T, Acc>(AnyPower{power});
}

template <class Job>
LWKD_INLINE void with_dtype(at::ScalarType dtype, double power, const Job& job) {
  if (dtype == at::kFloat) return with_power<float, float>(power, job);
  if (dtype == at::kHalf) return with_power<c10::Half, float>(power, job);
  if (dtype == at::kBFloat16) return with_power<c10::BFloat16, float>(power, job);
  with_power<double, double>(power, job);
}

}  // namespace lwkd
