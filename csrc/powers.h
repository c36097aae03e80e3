// |x|^p, its slope and its curvature. At exact zeros slope and curvature are 0 (ReLU features need a finite
// subgradient), except where the power is smooth there (p = 2).

#pragma once

#include <cmath>
#include <cstdint>

#include "clones.h"

namespace lwkd {

// The map of self-attention probabilities: the plain sum over heads.
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

}  // namespace lwkd
