// The first stage of the attention ops and the last of their backward: features cut into tiles, all layers and both
// nets in one launch for each dtype, memory order and divisibility. The kernels are in kernels/attention_tiles.py.
// Legend: B C N batch, channels, map positions of one feature.

#pragma once

#include <optional>
#include <vector>

#include "feature.h"
#include "layer_table.h"

namespace lwkd::cuda {

constexpr int64_t kLinearPower = -1;  // x itself: a plain sum over heads
constexpr int64_t kAnyPower = 0;      // an exponent known at run time; 2 is multiplied out

inline int64_t power_code(double power, bool probabilities) {
  return probabilities ? kLinearPower : power == 2 ? 2 : kAnyPower;
}

// Where the partial maps of one feature lie in their buffer: (B, partials, N) from offset on.
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

// Fills in the addresses of the launch with this number; operands are lists over the plan's features. Returns, for each
// group, whether all that is read wide is aligned.
std::vector<bool> fill_addresses(const TilePlan& plan, size_t number, const Operands& operands, LayerTable& table);

// Partial maps of all features, and those of the tangents if there are any.
void launch_partial_maps(const Place& place, const TilePlan& plan, const LayerTable& table,
                         const std::vector<bool>& aligned, double power, int64_t code, const at::Tensor& partials,
                         const std::optional<at::Tensor>& tangent_partials);

// Writes the gradients of all features, and with tangents those of the tangents. Operands: feature, cotangent of the
// map, gradient, and the same three of the tangent. grad: the gradients of the layers' divergences, by which the
// cotangents are multiplied where there are any.
void launch_feature_gradients(const Place& place, const TilePlan& plan, const LayerTable& table, size_t number,
                              const std::vector<bool>& aligned, double power, int64_t code, bool tangents,
                              const std::optional<at::Tensor>& grad);

}  // namespace lwkd::cuda
