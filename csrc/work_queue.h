// Items of unequal size shared between threads: each thread takes the next one. Which thread runs an item never
// changes a result, because every item writes to places of its own.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace lwkd {

// Below this many bytes waking a thread costs more than it saves.
constexpr int64_t kSerialBytes = 128 << 10;

template <class Item>
void run_items(int64_t count, int64_t bytes, const Item& item) {
  if (bytes < kSerialBytes) {
    for (int64_t i = 0; i < count; ++i) item(i);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), count), 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) item(i);
  });
}

}  // namespace lwkd
