// Tensors of very different size shared out among programs of equal work: every program reads one chunk and writes its
// partial sums, a second kernel adds the partials of each layer (kernels/chunks.py). A plan depends on sizes and
// dtypes, never on addresses.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "layer_table.h"

namespace lwkd::cuda {

// One launch: the tensors of one dtype.
struct ChunkGroup {
  at::ScalarType dtype;
  std::vector<int64_t> tensors;              // by row of the table
  int64_t table, ends, programs, addresses;  // sections of the layer table, and the grid

  int64_t rows() const { return static_cast<int64_t>(tensors.size()); }
  Arguments arguments(const LayerTable& layers) const { return layers.arguments(addresses, table, ends); }
};

// Groups tensors by dtype, in the order in which dtypes are met. add_row(tensor, table) appends the fields of a tensor
// and returns how many programs it takes. operands: addresses of each tensor's row.
std::vector<ChunkGroup> group_by_dtype(const std::vector<at::ScalarType>& dtypes, int64_t operands, Sections& sections,
                                       const std::function<int64_t(int64_t, std::vector<int64_t>&)>& add_row);

// How the tensors of one call are cut.
struct Cut {
  std::vector<at::ScalarType> dtypes;
  std::vector<int64_t> elements, chunks, layer_of;
  int64_t layers = 0;
};

// The partials of a layer lie side by side, whatever launches they come from.
struct ChunkPlan {
  std::vector<ChunkGroup> groups;
  int64_t layers = 0;    // section: per layer, first partial and number of partials
  int64_t partials = 0;  // in all
  LayerTable table;

  ChunkPlan(const Cut& cut, int64_t operands);

  // Brings the table up to date, then calls launch_group(group, the arguments to begin with, whether all addresses are
  // aligned) for every group.
  template <class LaunchGroup>
  void launch(const Place& place, const Operands& operands, const LaunchGroup& launch_group) {
    std::vector<bool> aligned;
    for (const ChunkGroup& group : groups) aligned.push_back(table.fill(group.addresses, group.tensors, operands));
    table.write(place);
    for (size_t i = 0; i < groups.size(); ++i) launch_group(groups[i], groups[i].arguments(table), aligned[i]);
  }
};

}  // namespace lwkd::cuda
