// |x|^p, its slope and its curvature, and the loop compiled for a power that is known at run time. At exact zeros slope
// and curvature are 0 (ReLU features need a finite subgradient), except where the power is smooth there (p = 2).

#pragma once

#include <cmath>
#include <cstdint>

#include "multiversion.h"

namespace lwkd {

// x itself: the map of self-attention probabilities is their plain sum over heads.
struct Identity {
  static constexpr bool kCheap = true;

  template <class Acc>
  LWKD_INLINE Acc value(Acc x) const {
    return x;
  }
  template <class Acc>
  LWKD_INLINE Acc slope(Acc) const {
    return 1;
  }
  template <class Acc>
  LWKD_INLINE Acc curvature(Acc) const {
    return 0;
  }
};

struct Square {
  static constexpr bool kCheap = true;

  template <class Acc>
  LWKD_INLINE Acc value(Acc x) const {
    return x * x;
  }
  template <class Acc>
  LWKD_INLINE Acc slope(Acc x) const {
    return x + x;
  }
  template <class Acc>
  LWKD_INLINE Acc curvature(Acc) const {
    return 2;
  }
};

struct Magnitude {
  static constexpr bool kCheap = true;

  template <class Acc>
  LWKD_INLINE Acc value(Acc x) const {
    return x < 0 ? -x : x;
  }
  template <class Acc>
  LWKD_INLINE Acc slope(Acc x) const {
    return x > 0 ? Acc(1) : (x < 0 ? Acc(-1) : x);  // x itself: 0, or NaN
  }
  template <class Acc>
  LWKD_INLINE Acc curvature(Acc) const {
    return 0;
  }
};

struct AnyPower {
  static constexpr bool kCheap = false;
  double power;

  template <class Acc>
  LWKD_INLINE Acc value(Acc x) const {
    return x == 0 ? Acc(0) : std::pow(std::abs(x), Acc(power));
  }
  template <class Acc>
  LWKD_INLINE Acc slope(Acc x) const {
    return x == 0 ? Acc(0) : std::copysign(Acc(power) * std::pow(std::abs(x), Acc(power - 1)), x);
  }
  template <class Acc>
  LWKD_INLINE Acc curvature(Acc x) const {
    return x == 0 ? Acc(0) : Acc(power * (power - 1)) * std::pow(std::abs(x), Acc(power - 2));
  }
};

// Stands for Identity; the public functions take powers of 1 and more.
constexpr double kIdentityPower = 0;

// A job for with_dtype (dtypes.h) that runs job.run<T, Acc>(power) with the power's own type.
template <class Job>
struct WithPower {
  double power;
  Job job;

  template <class T, class Acc>
  LWKD_INLINE void operator()(T, Acc) const {
    if (power == 2) return job.template run<T, Acc>(Square{});
    if (power == 1) return job.template run<T, Acc>(Magnitude{});
    if (power == kIdentityPower) return job.template run<T, Acc>(Identity{});
    job.template run<T, Acc>(AnyPower{power});
  }
};

}  // namespace lwkd
