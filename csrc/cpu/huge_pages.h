// Huge pages (2 MiB) for large results. Gradients are fresh memory on every call, and a page fault for each 4 KiB of it
// costs more than computing what is written there: asking for huge pages inside such a tensor halves the backward pass
// of large features. A hint to Linux only; where it is refused or ignored, only the time changes.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace lwkd {

inline void prefer_huge_pages(const at::Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.const_data_ptr()), end = begin + fresh.nbytes();
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  static_cast<void>(fresh);
#endif
}

}  // namespace lwkd
