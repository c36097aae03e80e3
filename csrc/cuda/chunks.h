// Tensors of very different size shared out among programs of equal work: every program reads one chunk and writes its
// partial sums, a second kernel adds the partials of each layer (kernels/chunks.py). A plan depends on sizes and
// dtypes, never on addresses.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "launch.h"
#include "layer_table.h"

namespace lwkd::cuda {

// One launch: the tensors of one dtype.
struct ChunkGroup {
  at::ScalarType dtype;
  std::vector<int64_t> tensors;   // by row of the table
  int64_t table, ends, programs;  // sections of the layer table, and the grid
  int64_t addresses;
};

// The arguments that every kernel over such tensors begins with: addresses, table, ends.
Arguments table_arguments(const LayerTable& table, const ChunkGroup& group);

// Which tensors have each dtype, in the order in which dtypes are met.
std::vector<std::pair<at::ScalarType, std::vector<int64_t>>> by_dtype(const std::vector<at::ScalarType>& dtypes);

struct ChunkPlan {
  std::vector<ChunkGroup> groups;
  int64_t layers = 0;    // section: per layer, first partial and number of partials
  int64_t partials = 0;  // in all
};

// How the tensors of one call are cut.
struct Cut {
  std::vector<at::ScalarType> dtypes;
  std::vector<int64_t> elements, chunks, layer_of;
  int64_t layers = 0;
};

// The partials of a layer lie side by side, whatever launches they come from. operands: addresses of each tensor's row.
ChunkPlan plan_chunks(const Cut& cut, int64_t operands, Sections& sections);

// Fills in the addresses of one group, row by row; whether all of them are aligned.
bool fill_addresses(const ChunkGroup& group, const std::vector<const std::vector<at::Tensor>*>& operands,
                    std::vector<int64_t>& addresses);

}  // namespace lwkd::cuda
