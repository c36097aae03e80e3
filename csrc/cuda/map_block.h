// How many positions of a map one program of the second stage holds in registers.

#pragma once

#include <cstdint>

#include "variant.h"

namespace lwkd::cuda {

struct MapBlock {
  bool more;  // whether some map is larger than the block, and is gone over again and again
  int64_t positions, warps;
};

constexpr MapBlock kLoopingBlock = {true, 512, 4};

inline MapBlock block_of(int64_t largest_map) {
  for (const MapBlock block : {MapBlock{false, 256, 1}, MapBlock{false, 1024, 4}, MapBlock{false, 4096, 8}})
    if (largest_map <= block.positions) return block;
  return kLoopingBlock;
}

}  // namespace lwkd::cuda
