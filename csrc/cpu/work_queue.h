// Items of unequal size shared between threads: each thread takes the next ones. Which thread runs an item never
// changes a result, because every item writes to places of its own.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace lwkd {

// Below this many bytes waking a thread costs more than it saves.
constexpr int64_t kSerialBytes = 128 << 10;

// Small items are taken several at a time, about this many bytes: neighbours in the queue are neighbours in memory, and
// what was fetched ahead is then used by the thread that fetched it.
constexpr int64_t kTurnBytes = 512 << 10;

template <class Item>
void run_items(int64_t count, int64_t bytes, const Item& item) {
  if (bytes < kSerialBytes) {
    for (int64_t i = 0; i < count; ++i) item(i);
    return;
  }
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  // Eight turns a thread or more, so that all of them end at about the same time.
  const int64_t turn = std::max<int64_t>(1, std::min(count / (8 * threads), kTurnBytes * count / bytes));
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(turn); i < count; i = next.fetch_add(turn))
      for (int64_t k = i; k < std::min(count, i + turn); ++k) item(k);
  });
}

}  // namespace lwkd
