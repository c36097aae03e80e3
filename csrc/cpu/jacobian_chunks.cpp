#include "jacobian_chunks.h"

#include <algorithm>
#include <type_traits>

#include "dtypes.h"
#include "simd8.h"

namespace lwkd {
namespace {

// Products of float32 are exact in float64 and summed there, because a direction distance of 1e-12 is the difference of
// sums near 1. Products of half precision are exact in float32 and summed there over one block, then in float64.
template <class T>
using SumsOf = std::conditional_t<std::is_same_v<T, float> || std::is_same_v<T, double>, double, float>;
constexpr int64_t kBlock = 128;  // elements, eight a lane of the even and of the odd sums

template <class Acc>
struct FourSums {
  Simd8<Acc> aa = {}, bb = {}, ab = {}, dd = {};

  LWKD_INLINE void add(const Simd8<Acc>& a, const Simd8<Acc>& b) {
    const Simd8<Acc> d = a - b;
    aa += a * a;
    bb += b * b;
    ab += a * b;
    dd += d * d;
  }

  template <class Narrow>
  LWKD_INLINE void add(const FourSums<Narrow>& even, const FourSums<Narrow>& odd) {
    aa += __builtin_convertvector(even.aa + odd.aa, Simd8<Acc>);
    bb += __builtin_convertvector(even.bb + odd.bb, Simd8<Acc>);
    ab += __builtin_convertvector(even.ab + odd.ab, Simd8<Acc>);
    dd += __builtin_convertvector(even.dd + odd.dd, Simd8<Acc>);
  }
};

// Whether float32 holds the sums of a block's squares with all their digits. Of bfloat16, whose range is that of
// float32, it does not hold the squares of numbers below 1e-19 (they would be 0) or above 1e19.
template <class T>
LWKD_INLINE bool in_range(const FourSums<float>& even, const FourSums<float>& odd) {
  if constexpr (!std::is_same_v<T, c10::BFloat16>) return true;
  bool inside = true;
  for (const Simd8<float>& squares : {even.aa + odd.aa, even.bb + odd.bb}) {
    float sum = 0;
    for (int j = 0; j < 8; ++j) sum += squares[j];
    inside = inside && sum > 1e-18f && sum < 1e36f;
  }
  return inside;
}

LWKD_INLINE double sum_lanes(const Simd8<double>& v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

template <class T, class Acc>
LWKD_INLINE void add8(FourSums<Acc>& sums, const T* a, const T* b) {
  Simd8<Acc> of_a, of_b;
  fill8<Acc>(of_a, [&](int j) { return Acc(a[j]); });
  fill8<Acc>(of_b, [&](int j) { return Acc(b[j]); });
  sums.add(of_a, of_b);
}

// Of 16 elements at a time.
template <class T, class Acc>
LWKD_INLINE void add_block(FourSums<Acc>& even, FourSums<Acc>& odd, const T* a, const T* b, int64_t count) {
  for (int64_t i = 0; i + 16 <= count; i += 16) {
    add8<T, Acc>(even, a + i, b + i);
    add8<T, Acc>(odd, a + i + 8, b + i + 8);
  }
}

template <class T>
LWKD_INLINE void sum_pair(const T* a, const T* b, int64_t count, double* sums) {
  using Acc = SumsOf<T>;
  FourSums<double> total;
  int64_t i = 0;
  while (i + 16 <= count) {
    const int64_t block = std::min(kBlock, (count - i) / 16 * 16);
    FourSums<Acc> even, odd;
    add_block(even, odd, a + i, b + i, block);
    bool exact = true;
    if constexpr (std::is_same_v<Acc, float>) exact = in_range<T>(even, odd);
    if (exact) {
      total.add(even, odd);
    } else {
      FourSums<double> wide_even, wide_odd;
      add_block(wide_even, wide_odd, a + i, b + i, block);
      total.add(wide_even, wide_odd);
    }
    i += block;
  }
  sums[0] = sum_lanes(total.aa);
  sums[1] = sum_lanes(total.bb);
  sums[2] = sum_lanes(total.ab);
  sums[3] = sum_lanes(total.dd);
  for (; i < count; ++i) {
    const double x = double(Acc(a[i])), y = double(Acc(b[i]));
    sums[0] += x * x;
    sums[1] += y * y;
    sums[2] += x * y;
    sums[3] += (x - y) * (x - y);
  }
}

template <class T, class Acc>
LWKD_INLINE void scale_pair(const T* a, const T* b, int64_t count, const double* g, T* __restrict grad_a,
                            T* __restrict grad_b) {
  const Acc g_aa = Acc(2 * g[0]), g_bb = Acc(2 * g[1]), g_ab = Acc(g[2]), g_dd = Acc(2 * g[3]);
  for (int64_t i = 0; i < count; ++i) {
    const Acc x = Acc(a[i]), y = Acc(b[i]), difference = g_dd * (x - y);
    grad_a[i] = T(g_aa * x + g_ab * y + difference);
    grad_b[i] = T(g_bb * y + g_ab * x - difference);
  }
}

template <class T, class Acc>
LWKD_INLINE void scale_first(const T* a, const T* b, int64_t count, const double* g, T* __restrict grad_a) {
  const Acc g_aa = Acc(2 * g[0]), g_ab = Acc(g[2]), g_dd = Acc(2 * g[3]);
  for (int64_t i = 0; i < count; ++i) {
    const Acc x = Acc(a[i]), y = Acc(b[i]);
    grad_a[i] = T(g_aa * x + g_ab * y + g_dd * (x - y));
  }
}

struct SumPair {
  const PairChunk& chunk;
  double* sums;

  template <class T, class Acc>
  LWKD_INLINE void operator()(T, Acc) const {
    sum_pair(reinterpret_cast<const T*>(chunk.a), reinterpret_cast<const T*>(chunk.b), chunk.count, sums);
  }
};

struct ScalePair {
  const PairChunk& chunk;
  const double* g;
  char *grad_a, *grad_b;

  template <class T, class Acc>
  LWKD_INLINE void operator()(T, Acc) const {
    const T *a = reinterpret_cast<const T*>(chunk.a), *b = reinterpret_cast<const T*>(chunk.b);
    if (grad_b == nullptr) {
      scale_first<T, Acc>(a, b, chunk.count, g, reinterpret_cast<T*>(grad_a));
    } else {
      scale_pair<T, Acc>(a, b, chunk.count, g, reinterpret_cast<T*>(grad_a), reinterpret_cast<T*>(grad_b));
    }
  }
};

}  // namespace

LWKD_MULTIVERSION void sum_chunk(const PairChunk& chunk, double* sums) {
  with_dtype(chunk.dtype, SumPair{chunk, sums});
}

LWKD_MULTIVERSION void scale_chunk(const PairChunk& chunk, const double* g, char* grad_a, char* grad_b) {
  with_dtype(chunk.dtype, ScalePair{chunk, g, grad_a, grad_b});
}

}  // namespace lwkd
