// The loops over a pair of derivatives, cut into chunks: a chunk is a run of neighbouring elements of both, read once.

#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace lwkd {

// Elements of a chunk. Sums are formed chunk by chunk and chunks added in order, however many threads there are.
constexpr int64_t kChunk = 1 << 15;

// A run of count elements of a and b, which have one dtype.
struct PairChunk {
  c10::ScalarType dtype;
  const char *a, *b;
  int64_t count;
};

// sums = aa, bb, ab, dd of the chunk.
void sum_chunk(const PairChunk& chunk, double* sums);

// grad_a = 2 g[0] a + g[2] b + 2 g[3] (a - b), grad_b = 2 g[1] b + g[2] a - 2 g[3] (a - b), in the dtype of the chunk;
// grad_b may be null.
void scale_chunk(const PairChunk& chunk, const double* g, char* grad_a, char* grad_b);

}  // namespace lwkd
