// Eight numbers in one or two vector registers, whatever the machine: an array of sums would live in memory.

#pragma once

#include <cstring>

#include "clones.h"

namespace lwkd {

template <class Acc>
struct EightOf {
  typedef Acc type __attribute__((vector_size(8 * sizeof(Acc))));
};

template <class Acc>
using Eight = typename EightOf<Acc>::type;

// vector = number(0), ..., number(7), which are computed as a vector where the machine can. Handed over by reference:
// how vectors are returned differs between machines.
template <class Acc, class Number>
LWKD_INLINE void set_eight(Eight<Acc>& vector, const Number& number) {
  Acc values[8];
  for (int j = 0; j < 8; ++j) values[j] = number(j);
  std::memcpy(&vector, values, sizeof vector);
}

}  // namespace lwkd
