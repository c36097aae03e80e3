// Eight numbers in vector registers, one or two on most machines: an array of sums would be kept in memory.

#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "multiversion.h"

namespace lwkd {

template <class Acc>
struct Simd8Of {
  typedef Acc type __attribute__((vector_size(8 * sizeof(Acc))));
};

template <class Acc>
using Simd8 = typename Simd8Of<Acc>::type;

// vector = number(0), ..., number(7), computed as a vector where the machine can. By reference, here and below, since
// the instruction set decides how a vector is returned.
template <class Acc, class Number>
LWKD_INLINE void fill8(Simd8<Acc>& vector, const Number& number) {
  Acc values[8];
  for (int j = 0; j < 8; ++j) values[j] = number(j);
  std::memcpy(&vector, values, sizeof vector);
}

// Eight numbers of 16 bits, and of 32.
typedef uint16_t Bits16 __attribute__((vector_size(16)));
typedef uint32_t Bits32 __attribute__((vector_size(32)));
typedef int32_t Whole __attribute__((vector_size(32)));

// float16 from and to float32: exponents count from 15 instead of 127, and numbers below 2^-14 have steps of 2^-24.
LWKD_INLINE void widen_half(const Bits16& halves, Simd8<float>& numbers) {
  const Bits32 bits = __builtin_convertvector(halves, Bits32), magnitude = bits & 0x7fffu, shifted = magnitude << 13;
  const Bits32 ordinary = shifted + (112u << 23), infinite = shifted + (224u << 23);
  const Bits32 steps = (Bits32)(__builtin_convertvector((Whole)magnitude, Simd8<float>) * 0x1p-24f);
  const Bits32 finite = magnitude < 0x400u ? steps : ordinary;
  numbers = (Simd8<float>)((magnitude < 0x7c00u ? finite : infinite) | ((bits & 0x8000u) << 16));
}

// To the nearest, ties to even.
LWKD_INLINE void narrow_half(const Simd8<float>& numbers, Bits16& halves) {
  constexpr uint32_t kSmallest = 0x38800000, kInfinity = 0x47800000, kHalf = 0x3f000000;  // 2^-14, 2^16, 0.5
  const Bits32 bits = (Bits32)numbers, magnitude = bits & 0x7fffffffu;
  const Bits32 finite = magnitude < kInfinity ? magnitude : Bits32{} + kInfinity;
  const Bits32 ordinary = ((finite + 0xfffu + ((finite >> 13) & 1u)) >> 13) - (112u << 10);
  // Numbers from 0.5 on have steps of 2^-24, to which this sum is rounded.
  const Bits32 steps = (Bits32)((Simd8<float>)magnitude + 0.5f) - kHalf;
  const Bits32 rounded = magnitude < kSmallest ? steps : ordinary;
  const Bits32 half = numbers == numbers ? rounded : Bits32{} + 0x7e00u;
  halves = __builtin_convertvector(half | ((bits >> 16) & 0x8000u), Bits16);
}

// Eight adjacent numbers.
template <class T, class Acc>
LWKD_INLINE void load8(const T* from, Simd8<Acc>& vector) {
  if constexpr (std::is_same_v<T, Acc>) {
    std::memcpy(&vector, from, sizeof vector);
  } else if constexpr (std::is_same_v<Acc, float> && sizeof(T) == 2) {
    Bits16 bits;
    std::memcpy(&bits, from, sizeof bits);
    if constexpr (std::is_same_v<T, c10::Half>) {
      widen_half(bits, vector);
    } else {
      vector = (Simd8<Acc>)(__builtin_convertvector(bits, Bits32) << 16);
    }
  } else {
    fill8<Acc>(vector, [&](int j) { return Acc(from[j]); });
  }
}

// Sixteen adjacent numbers, in an order that depends only on T. Of bfloat16 one vector takes the even numbers and one
// the odd, the lower and upper halves of 32 bits: two instructions, where widening all sixteen takes four.
template <class T, class Acc>
LWKD_INLINE void load16(const T* from, Simd8<Acc>& first, Simd8<Acc>& second) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    Bits32 pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    first = (Simd8<Acc>)(pairs << 16);
    second = (Simd8<Acc>)(pairs & 0xffff'0000u);
  } else {
    load8<T, Acc>(from, first);
    load8<T, Acc>(from + 8, second);
  }
}

// Sixteen adjacent numbers in the order of load16, rounded as T rounds: bfloat16 to the nearest, ties to even.
template <class T, class Acc>
LWKD_INLINE void store16(const Simd8<Acc>& first, const Simd8<Acc>& second, T* to) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const auto rounded = [](const Simd8<Acc>& numbers, Bits32& bits) {  // in the upper halves
      const Bits32 exact = (Bits32)numbers, nan = (Bits32)(numbers != numbers);
      bits = ((exact + 0x7fffu + ((exact >> 16) & 1u)) & ~nan) | (nan & 0x7fc0'0000u);
    };
    Bits32 even, odd;
    rounded(first, even);
    rounded(second, odd);
    const Bits32 pairs = (even >> 16) | (odd & 0xffff'0000u);
    std::memcpy(to, &pairs, sizeof pairs);
  } else if constexpr (std::is_same_v<T, c10::Half>) {
    Bits16 low, high;
    narrow_half(first, low);
    narrow_half(second, high);
    std::memcpy(to, &low, sizeof low);
    std::memcpy(to + 8, &high, sizeof high);
  } else if constexpr (std::is_same_v<T, Acc>) {
    std::memcpy(to, &first, sizeof first);
    std::memcpy(to + 8, &second, sizeof second);
  } else {
    for (int j = 0; j < 8; ++j) to[j] = T(first[j]);
    for (int j = 0; j < 8; ++j) to[j + 8] = T(second[j]);
  }
}

// to = the lanes of a (0 to 7) and b (8 to 15) with these numbers. GCC has the builtin from version 12 on.
template <int... kLanes, class Vector>
LWKD_INLINE void pick_lanes(const Vector& a, const Vector& b, Vector& to) {
#if __has_builtin(__builtin_shufflevector)
  to = __builtin_shufflevector(a, b, kLanes...);
#else
  to = Vector{(kLanes < 8 ? a[kLanes % 8] : b[kLanes % 8])...};
#endif
}

// The four lanes of each half of a and b become two sums of neighbours of a and two of b.
template <class Vector>
LWKD_INLINE void add_neighbours(Vector& a, const Vector& b) {
  Vector even, odd;
  pick_lanes<0, 2, 8, 10, 4, 6, 12, 14>(a, b, even);
  pick_lanes<1, 3, 9, 11, 5, 7, 13, 15>(a, b, odd);
  a = even + odd;
}

// rows[0][k] = the sum of the numbers of rows[k]: a transposition in which every step adds.
template <class Vector>
LWKD_INLINE void add_up_rows(Vector (&rows)[8]) {
  for (int k = 0; k < 8; k += 2) add_neighbours(rows[k], rows[k + 1]);
  for (int k = 0; k < 8; k += 4) add_neighbours(rows[k], rows[k + 2]);
  Vector low, high;
  pick_lanes<0, 1, 2, 3, 8, 9, 10, 11>(rows[0], rows[4], low);
  pick_lanes<4, 5, 6, 7, 12, 13, 14, 15>(rows[0], rows[4], high);
  rows[0] = low + high;
}

}  // namespace lwkd
