// Who has which part of a map in the second stage of the attention ops (kernels/attention_split.py).

#pragma once

#include <algorithm>
#include <cstdint>

#include "launch.h"

namespace lwkd::cuda {

constexpr int64_t kLargestWhole = 4096;  // map positions that one program goes over
constexpr int64_t kSegment = 2048;       // that each program has where some map of the call is larger
constexpr int64_t kSums = 8;             // SUMS: floats that a program leaves for the next phase

// What a program holds of a map in registers, eight positions a thread. For a map of 4,096 that takes 16 warps; in
// blocks of 512, one after the other, an H200 took up to twice as long.
struct MapBlock {
  bool more;  // whether some program has more positions than that
  int64_t positions, warps;
};

constexpr MapBlock kLoopingBlock = {true, 512, 4};

struct MapSplit {
  MapBlock block;
  bool split;

  // many_maps: of one sample, as the rows of probabilities are; each then has a program of its own, however large, and
  // small enough that several fit on a processor.
  explicit MapSplit(int64_t largest_map = 1, bool many_maps = false)
      : block(kLoopingBlock), split(largest_map > kLargestWhole && !many_maps) {
    for (const MapBlock whole : {MapBlock{false, 4096, 16}, MapBlock{false, 1024, 4}, MapBlock{false, 256, 1}})
      if (largest_map <= whole.positions && !(many_maps && whole.warps > kLoopingBlock.warps)) block = whole;
  }

  int64_t segments(int64_t positions) const { return split ? ceil_div(positions, kSegment) : 1; }
};

}  // namespace lwkd::cuda
