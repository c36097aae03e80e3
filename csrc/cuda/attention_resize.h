// Between the two stages of the attention ops: the maps whose size changes are resized into the buffer of partial maps,
// behind all of these, and their cotangents back by the transpose (kernels/attention_resize.py).

#pragma once

#include <vector>

#include "attention_tiles.h"

namespace lwkd::cuda {

struct ResizePlan {
  std::vector<int64_t> features;  // whose map changes its size, by row of the table
  int64_t table = 0, ends = 0, backward_ends = 0, programs = 0, backward_programs = 0;
  std::vector<int64_t> addresses;  // one section for each backward launch
  std::vector<MapPlace> places;    // where the maps of all features lie afterwards; a resized map is in one part
  int64_t length = 0;              // float32 in the buffer that holds partial and resized maps

  bool none() const { return features.empty(); }
};

ResizePlan plan_resize(const std::vector<Geometry>& features, const TilePlan& tiles, const std::vector<Size3>& sizes,
                       Sections& sections);

// Room in the table for the addresses of one backward launch.
void add_addresses(ResizePlan& plan, Sections& sections);

// Writes the resized maps; no launch where no size changes.
void launch_resize(const Place& place, const ResizePlan& plan, const LayerTable& table, const at::Tensor& partials);

// Fills in the addresses of the backward launch with this number: over all features, cotangents of the maps at the new
// size, and at their own size, to be written.
void fill_addresses(const ResizePlan& plan, size_t number, const std::vector<at::Tensor>& resized,
                    const std::vector<at::Tensor>& own, LayerTable& table);

void launch_resize_backward(const Place& place, const ResizePlan& plan, const LayerTable& table, size_t number);

}  // namespace lwkd::cuda
