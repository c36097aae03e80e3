// The first stage of the attention ops and the last of their backward: features cut into tiles, all layers and both
// nets in one launch for each dtype, memory order and divisibility. The kernels are in kernels/attention_tiles.py.
// Legend: B C N batch, channels, map positions of one feature.

#pragma once

#include <optional>
#include <vector>

#include "feature.h"
#include "launch.h"
#include "layer_table.h"

namespace lwkd::cuda {

constexpr int64_t kLinearPower = -1;  // x itself: a plain sum over heads
constexpr int64_t kAnyPower = 0;      // an exponent known at run time; 2 is multiplied out

inline int64_t power_code(double power, bool probabilities) {
  return probabilities ? kLinearPower : power == 2 ? 2 : kAnyPower;
}

// Where the partial maps of one feature lie: (B, partials, N) from offset on.
struct MapPlace {
  int64_t offset, partials;
};

// One launch: features of one dtype, memory order and divisibility.
struct TileGroup {
  at::ScalarType dtype;
  bool channels_last, wide;
  std::vector<int64_t> features;          // of the plan, by row of the table
  int64_t table, ends, layers, programs;  // sections of the layer table, and the grid
  std::vector<int64_t> addresses;         // one section for each launch of this group
};

// A plan depends on the geometry of the features only, never on their addresses.
struct TilePlan {
  std::vector<TileGroup> groups;
  std::vector<MapPlace> places;  // by feature
  int64_t partials = 0;          // float32 in the buffer of partial maps
};

// Cuts all features into tiles of similar size, the largest maps first. A tile is 128 columns of some rows (channels),
// or, with channels last, some rows (positions) of some columns (channels); either way a program sums one chunk of
// channels and writes one partial map of its positions.
TilePlan plan_tiles(const std::vector<Geometry>& features, Sections& sections);

// Room in the table for the addresses of one launch of every group, so many for each feature.
void add_addresses(TilePlan& plan, int64_t operands, Sections& sections);

// Lists of tensors over the plan's features, all read by one launch.
using Operands = std::vector<const std::vector<at::Tensor>*>;

// Fills in the addresses of the launch with this number. Returns, for each group, whether all is aligned.
std::vector<bool> fill_addresses(const TilePlan& plan, size_t number, const Operands& operands,
                                 std::vector<int64_t>& addresses);

// Partial maps of all features, and those of the tangents if there are any.
void launch_partial_maps(const Place& place, const TilePlan& plan, const LayerTable& table,
                         const std::vector<bool>& aligned, double power, int64_t code, const at::Tensor& partials,
                         const std::optional<at::Tensor>& tangent_partials);

// Gradients of all features (and of their tangents), from the operands feature, cotangent of the map, gradient (and the
// same three of the tangent); grad: gradient of each layer's divergence, where there is one.
void launch_feature_gradients(const Place& place, const TilePlan& plan, const LayerTable& table, size_t number,
                              const std::vector<bool>& aligned, double power, int64_t code, bool tangents,
                              const std::optional<at::Tensor>& grad);

}  // namespace lwkd::cuda
