// attention_maps on CUDA, forward and backward; kernels in kernels/attention{,_tiles,_resize}.py.
// Legend: L layers, B batch, C channels, N map positions.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "attention_resize.h"
#include "attention_split.h"

namespace lwkd::cuda {
namespace {

struct MapsPlan {
  TilePlan tiles;
  ResizePlan resizing;
  int64_t layers = 0, map_table = 0, ends = 0, programs = 0, maps = 0;
  int64_t samples = 0;  // of all layers
  MapSplit split;
  LayerTable table;
};

struct MapsBackwardPlan : MapsPlan {};  // the same, with room for the addresses of backward

// Features, their tangents and the sizes of their maps, checked, as the kernels read them.
struct Input {
  Features features, tangents;
  std::vector<Size3> sizes;

  int64_t sides() const { return tangents.tensors.empty() ? 1 : 2; }

  Plans<MapsPlan>::Key key() const {
    Plans<MapsPlan>::Key key = {sides()};
    for (const Geometry& g : features.geometries) g.add_to(key);
    for (const Size3& size : sizes) key.insert(key.end(), size.begin(), size.end());
    return key;
  }

  // Empty maps (B, N) of the requested sizes.
  std::vector<at::Tensor> maps() const {
    std::vector<at::Tensor> maps;
    for (size_t l = 0; l < sizes.size(); ++l)
      maps.push_back(at::empty({features.geometries[l].samples, positions_of(sizes[l])},
                               features.tensors[l].options().dtype(at::kFloat)));
    return maps;
  }

  Operands operands() const {
    return sides() == 2 ? Operands{&features.tensors, &tangents.tensors} : Operands{&features.tensors};
  }
};

Input checked_input(const char* op, at::TensorList features, at::TensorList tangents, double power,
                    at::IntArrayRef sizes) {
  const int64_t layers = static_cast<int64_t>(features.size());
  checks::maps_call(op, features, tangents, power, sizes);
  Input input;
  for (int64_t l = 0; l < layers; ++l) {
    const at::IntArrayRef size = sizes.slice(0, features[l].dim() - 2);
    sizes = sizes.slice(features[l].dim() - 2);
    checks::size(op, l, size);
    checks::on_gpu(checks::at_layer(op, l, "feature"), features[l], features[0].device());
    input.sizes.push_back(padded(size));
    if (tangents.empty()) {
      input.features.add(features[l]);
      continue;
    }
    checks::on_gpu(checks::at_layer(op, l, "tangent"), tangents[l], features[0].device());
    add_matched(features[l], tangents[l], input.features, input.tangents);
  }
  return input;
}

// Fields as MAP_FIELDS says: offset and number of the partial maps, N, positions of a segment, first program and
// sample.
template <class Plan>
std::unique_ptr<Plan> make_plan(const Input& input, bool backward) {
  auto plan = std::make_unique<Plan>();
  Sections sections;
  const int64_t sides = input.sides();
  plan->layers = static_cast<int64_t>(input.sizes.size());
  plan->tiles = plan_tiles(input.features.geometries, sections);
  add_addresses(plan->tiles, backward ? 3 * sides : sides, sections);
  plan->resizing = plan_resize(input.features.geometries, plan->tiles, input.sizes, sections);
  if (backward)
    for (int64_t side = 0; side < sides; ++side) add_addresses(plan->resizing, sections);
  std::vector<int64_t> table, ends;
  int64_t largest = 1;
  for (const Size3& size : input.sizes) largest = std::max(largest, positions_of(size));
  plan->split = MapSplit(largest);
  for (int64_t l = 0; l < plan->layers; ++l) {
    const MapPlace place = plan->resizing.places[l];
    const int64_t positions = positions_of(input.sizes[l]);
    const int64_t samples = input.features.geometries[l].samples;
    table.insert(table.end(), {place.offset, place.partials, positions, kSegment, plan->programs, plan->samples});
    plan->programs += samples * plan->split.segments(positions);
    plan->samples += samples;
    ends.push_back(plan->programs);
  }
  plan->map_table = sections.add(table);
  plan->ends = sections.add(ends);
  plan->maps = sections.add_addresses(plan->layers * sides * (backward ? 3 : 1));
  plan->table = LayerTable(sections);
  return plan;
}

// The second stage: one launch, or two where maps are split. leading: the pointers before the table; constant: the one
// beside PHASE and BLOCK.
void launch_maps(const Place& place, const MapsPlan& plan, const Variant& named, const Arguments& leading,
                 const char* constant, int64_t value, MapBlock block) {
  const bool split = plan.split.split;
  at::Tensor sums;
  if (split) sums = at::empty({plan.programs * kSums}, at::TensorOptions().dtype(at::kFloat).device(place.device()));
  for (const char* phase : split ? std::vector<const char*>{"sums", "rest"} : std::vector<const char*>{"whole"}) {
    Arguments arguments = leading;
    arguments.pointer(plan.table.fixed(plan.map_table)).pointer(plan.table.fixed(plan.ends));
    if (split) arguments.pointer(sums);
    arguments.pointer(plan.table.address(plan.maps)).count(plan.layers);
    Variant variant = named;
    variant.pointer("sums_ptr", split).set("PHASE", phase).set(constant, value).set("BLOCK", block.positions);
    cuda::launch(place, variant.warps(block.warps), plan.programs, arguments);
  }
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, at::Tensor> attention_maps_cuda(  //
    at::TensorList features,                                                                   // L x (B, C, *spatial)
    at::TensorList tangents,                                                                   // the same, or none
    double power,
    at::IntArrayRef sizes) {  // the spatial sizes of all maps, one behind the other
  const Input input = checked_input("attention_maps", features, tangents, power, sizes);
  const Place place(features[0]);
  auto plan =
      plans<MapsPlan>().take(place, input.key(), [&] { return make_plan<MapsPlan>(input, /*backward=*/false); });
  const std::vector<at::Tensor> maps = input.maps();
  const std::vector<at::Tensor> map_tangents = input.sides() == 2 ? input.maps() : std::vector<at::Tensor>();
  const std::vector<bool> aligned = fill_addresses(plan->tiles, 0, input.operands(), plan->table);
  plan->table.fill(plan->maps, input.sides() == 2 ? Operands{&maps, &map_tangents} : Operands{&maps});
  plan->table.write(place);

  const auto options = at::TensorOptions().dtype(at::kFloat).device(place.device());
  // Partial maps of features and tangents, the resized ones behind them.
  const at::Tensor partials = at::empty({plan->resizing.length}, options);
  std::optional<at::Tensor> tangent_partials;
  if (input.sides() == 2) tangent_partials = at::empty({plan->resizing.length}, options);
  launch_partial_maps(place, plan->tiles, plan->table, aligned, power, power_code(power, false), partials,
                      tangent_partials);
  launch_resize(place, plan->resizing, plan->table, partials);
  if (tangent_partials.has_value()) launch_resize(place, plan->resizing, plan->table, *tangent_partials);

  const at::Tensor totals = at::empty({plan->samples, input.sides()}, options);
  Arguments arguments;
  arguments.pointer(partials);
  if (tangent_partials.has_value()) arguments.pointer(*tangent_partials);
  arguments.pointer(totals);
  Variant variant("attention_maps_fwd");
  variant.pointer("tangent_partials_ptr", tangent_partials.has_value());
  const MapBlock block = plan->split.block;
  launch_maps(place, *plan, variant, arguments, "MORE", block.more, block);
  return {maps, map_tangents, totals};
}

constexpr const char* kBackward = "attention_maps_backward";

// What backward reads and computes of one side (features or tangents): maps and their gradients, cotangents of the maps
// before they were normalised at the new and at their own size, and gradients.
struct Side {
  std::vector<at::Tensor> maps, grads, resized, own;
  Gradients<FeatureGradient> gradients;

  Side(at::TensorList maps_, at::TensorList grad_maps, at::TensorList given, const Input& input, const Features& read)
      : maps(maps_.vec()), resized(input.maps()) {
    for (size_t l = 0; l < read.tensors.size(); ++l) {
      const Geometry& g = read.geometries[l];
      checks::on_gpu(checks::at_layer(kBackward, static_cast<int64_t>(l), "map"), maps[l], read.tensors[0].device());
      checks::weights(kBackward, static_cast<int64_t>(l), "map", maps[l], at::kFloat, resized[l].numel());
      checks::on_gpu(checks::at_layer(kBackward, static_cast<int64_t>(l), "grad"), grad_maps[l],
                     read.tensors[0].device());
      checks::same_shape(kBackward, static_cast<int64_t>(l), "map", resized[l], "grad", grad_maps[l]);
      grads.push_back(grad_maps[l].to(at::kFloat).contiguous());
      own.push_back(g.size == input.sizes[l] ? resized[l] : at::empty({g.samples, g.positions}, resized[l].options()));
      gradients.add(given[l], g);
    }
  }
};

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> attention_maps_backward_cuda(  //
    at::TensorList grad_maps,                                                               // L x (B, N)
    at::TensorList grad_map_tangents,                                                       // L x (B, N), or none
    at::TensorList features, at::TensorList tangents, double power, at::IntArrayRef sizes,
    at::TensorList maps,         // L x (B, N) and, with tangents, behind them those of the maps
    const at::Tensor& totals) {  // (samples of all layers, 1, or 2 with tangents)
  const Input input = checked_input(kBackward, features, tangents, power, sizes);
  const int64_t layers = static_cast<int64_t>(features.size()), columns = input.sides();
  checks::map_gradients(kBackward, features, grad_maps, tangents, grad_map_tangents);
  checks::same_layers(kBackward, "features and tangents", columns * layers, "maps", static_cast<int64_t>(maps.size()));
  const Place place(features[0]);
  auto plan = plans<MapsBackwardPlan>().take(place, input.key(),
                                             [&] { return make_plan<MapsBackwardPlan>(input, /*backward=*/true); });
  checks::on_gpu(checks::at_layer(kBackward, 0, "totals"), totals, features[0].device());
  checks::weights(kBackward, 0, "totals", totals, at::kFloat, plan->samples * columns);
  std::vector<Side> sides = {Side(maps.slice(0, layers), grad_maps, features, input, input.features)};
  if (columns == 2) sides.emplace_back(maps.slice(layers), grad_map_tangents, tangents, input, input.tangents);

  Operands cotangents, written;
  for (size_t side = 0; side < sides.size(); ++side) {
    const Side& of = sides[side];
    cotangents.insert(cotangents.end(), {&of.maps, &of.grads, &of.resized});
    written.insert(written.end(), {input.operands()[side], {&of.own, /*wide=*/false}, &of.gradients.written});
    fill_addresses(plan->resizing, side, of.resized, of.own, plan->table);
  }
  plan->table.fill(plan->maps, cotangents);
  const std::vector<bool> aligned = fill_addresses(plan->tiles, 0, written, plan->table);
  plan->table.write(place);

  Arguments arguments;
  arguments.pointer(totals);
  launch_maps(place, *plan, Variant("attention_maps_bwd"), arguments, "TANGENT", columns == 2, kLoopingBlock);
  for (size_t side = 0; side < sides.size(); ++side) launch_resize_backward(place, plan->resizing, plan->table, side);
  launch_feature_gradients(place, plan->tiles, plan->table, 0, aligned, power, power_code(power, false), columns == 2,
                           std::nullopt);
  return {sides[0].gradients.finish(), sides.size() == 2 ? sides[1].gradients.finish() : std::vector<at::Tensor>()};
}

}  // namespace

TORCH_LIBRARY_IMPL(lwkd, CUDA, m) {
  m.impl("attention_maps", attention_maps_cuda);
  m.impl("attention_maps_backward", attention_maps_backward_cuda);
}

}  // namespace lwkd::cuda
