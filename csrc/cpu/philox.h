// Philox4x32-10 (Salmon et al. 2011): four random words for a key and a counter, the same on every device.

#pragma once

#include <cstdint>
#include <utility>

#include "multiversion.h"

namespace lwkd {

// One counter and its key. A loop over many of them becomes vector code, since nothing here branches or leaves the
// registers.
struct Philox {
  uint32_t c0, c1, c2, c3, k0, k1;

  LWKD_INLINE void round() {
    const uint64_t p0 = uint64_t{c0} * 0xD2511F53u, p1 = uint64_t{c2} * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }

  // Written out round by round: a loop in here would keep the loop around it from becoming vector code.
  template <int... Rounds>
  LWKD_INLINE void rounds(std::integer_sequence<int, Rounds...>) {
    ((static_cast<void>(Rounds), round()), ...);
  }
};

// words[w * stride + j] = word w of the counter (first + j, second, 0, 0); the key's low word comes first.
LWKD_INLINE void philox_words(uint64_t key, uint32_t first, uint32_t second, int count, int stride,
                              uint32_t* __restrict words) {
  for (int j = 0; j < count; ++j) {
    Philox philox = {first + j, second, 0, 0, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
    philox.rounds(std::make_integer_sequence<int, 10>());
    words[j] = philox.c0;
    words[stride + j] = philox.c1;
    words[2 * stride + j] = philox.c2;
    words[3 * stride + j] = philox.c3;
  }
}

}  // namespace lwkd
