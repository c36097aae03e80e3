// attention_divergence on CUDA, forward and backward; kernels in kernels/attention_{tiles,divergence,resize}.py.
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

constexpr const char* kOp = "attention_divergence";
constexpr const char* kBackward = "attention_divergence_backward";

// The features of both nets, checked.
struct Sides {
  Features both;             // the student's layers, then the teacher's
  std::vector<Size3> sizes;  // at which the maps of each layer are compared

  Sides(at::TensorList student, at::TensorList teacher, bool probabilities) {
    const c10::Device device = student[0].device();
    const int64_t layers = static_cast<int64_t>(student.size());
    for (int64_t l = 0; l < layers; ++l) {
      checks::divergence_layer(kOp, l, student[l], teacher[l], probabilities);
      checks::on_gpu(checks::at_layer(kOp, l, "student"), student[l], device);
      checks::on_gpu(checks::at_layer(kOp, l, "teacher"), teacher[l], device);
      both.add(student[l]);
    }
    for (int64_t l = 0; l < layers; ++l) {
      both.add(teacher[l]);
      sizes.push_back(smaller_of(both.geometries[l].size, both.geometries[layers + l].size));
    }
  }
};

struct DivergencePlan {
  TilePlan tiles;
  ResizePlan resizing, factor_resizing;  // of the maps of both nets, of the student's factors
  int64_t layers = 0, layer_table = 0, ends = 0, counters = 0, factors = 0;
  int64_t programs = 0;  // of all layers: samples, times query rows, times segments of a map
  MapSplit split;
  LayerTable table;
};

// LAYER_FIELDS, as attention_divergence_fwd reads them: offset and number of the student's partial maps, of the
// teacher's, positions of one map, maps a sample, heads of the student, of the teacher, first program, number of
// programs, positions of a segment. With probabilities every query row is a map, and the mean over heads decides
// whether it is empty.
void plan_layers(const Sides& sides, bool probabilities, Sections& sections, DivergencePlan& plan) {
  plan.layers = static_cast<int64_t>(sides.sizes.size());
  std::vector<int64_t> table, ends, maps, positions;  // maps a sample, positions of one
  for (int64_t l = 0; l < plan.layers; ++l) {
    maps.push_back(probabilities ? sides.both.tensors[l].size(2) : 1);
    positions.push_back(positions_of(sides.sizes[l]) / maps[l]);
  }
  plan.split = MapSplit(*std::max_element(positions.begin(), positions.end()), /*many_maps=*/probabilities);
  for (int64_t l = 0; l < plan.layers; ++l) {
    const Geometry &s = sides.both.geometries[l], &t = sides.both.geometries[plan.layers + l];
    const MapPlace place_S = plan.resizing.places[l], place_T = plan.resizing.places[plan.layers + l];
    const int64_t heads_S = probabilities ? s.channels : 1, heads_T = probabilities ? t.channels : 1;
    const int64_t programs = s.samples * maps[l] * plan.split.segments(positions[l]);
    table.insert(table.end(), {place_S.offset, place_S.partials, place_T.offset, place_T.partials, positions[l],
                               maps[l], heads_S, heads_T, plan.programs, programs, kSegment});
    plan.programs += programs;
    ends.push_back(plan.programs);
  }
  plan.layer_table = sections.add(table);
  plan.ends = sections.add(ends);
  plan.counters = sections.add(std::vector<int64_t>(ceil_div(plan.layers, 2)));  // int32
}

std::unique_ptr<DivergencePlan> make_plan(const Sides& sides, bool probabilities, bool save_factors) {
  auto plan = std::make_unique<DivergencePlan>();
  Sections sections;
  const std::vector<Geometry>& both = sides.both.geometries;
  std::vector<Size3> sizes_of_both = sides.sizes;
  sizes_of_both.insert(sizes_of_both.end(), sides.sizes.begin(), sides.sizes.end());

  plan->tiles = plan_tiles(both, sections);
  add_addresses(plan->tiles, 1, sections);
  plan->resizing = plan_resize(both, plan->tiles, sizes_of_both, sections);
  plan_layers(sides, probabilities, sections, *plan);
  if (save_factors) {
    plan->factors = sections.add_addresses(plan->layers);
    const std::vector<Geometry> student(both.begin(), both.begin() + plan->layers);
    plan->factor_resizing = plan_resize(student, plan->tiles, sides.sizes, sections);
    add_addresses(plan->factor_resizing, sections);
  }
  plan->table = LayerTable(sections);
  return plan;
}

// The factors at the student's own size, which backward reads, and at the size at which maps are compared: the same
// tensors where no size changes.
struct Factors {
  std::vector<at::Tensor> own, compared;

  Factors(const Sides& sides, bool probabilities) {
    for (size_t l = 0; l < sides.sizes.size(); ++l) {
      const Geometry& g = sides.both.geometries[l];
      const Size3& size = sides.sizes[l];
      const at::Tensor& student = sides.both.tensors[l];
      const auto options = student.options().dtype(at::kFloat);
      std::vector<int64_t> shape = {g.samples, g.positions};
      if (probabilities) shape = {g.samples, student.size(2), student.size(3)};
      own.push_back(at::empty(shape, options));
      compared.push_back(g.size == size ? own[l] : at::empty({g.samples, positions_of(size)}, options));
    }
  }
};

// The launches of the second stage: one, or where maps are split one after every sum over a whole map.
std::vector<const char*> phases(bool split, c10::string_view kind, bool save_factors) {
  if (!split) return {"whole"};
  std::vector<const char*> phases = {"sums"};
  if (kind == "l2") phases.push_back("norms");
  phases.push_back("distances");
  if (save_factors) phases.push_back("factors");
  return phases;
}

std::tuple<at::Tensor, std::vector<at::Tensor>> attention_divergence_cuda(  //
    at::TensorList student,                                                 // L x (B, C, *spatial)
    at::TensorList teacher,                                                 // L x (B, C', *spatial')
    c10::string_view source, double power, c10::string_view kind,
    at::ArrayRef<double> betas,  // (student, teacher)
    bool save_factors) {
  checks::divergence_call(kOp, student, teacher, source, kind, power, betas);
  const bool probabilities = source == "probabilities";
  const Sides sides(student, teacher, probabilities);

  const Place place(student[0]);
  Plans<DivergencePlan>::Key key = {probabilities, save_factors};
  for (const Geometry& g : sides.both.geometries) g.add_to(key);
  if (probabilities)
    for (const at::Tensor& t : student) key.push_back(t.size(2));
  auto plan = plans<DivergencePlan>().take(place, std::move(key),
                                           [&] { return make_plan(sides, probabilities, save_factors); });

  const auto options = at::TensorOptions().dtype(at::kFloat).device(place.device());
  const at::Tensor partials = at::empty({plan->resizing.length}, options);
  const at::Tensor distances = at::empty({plan->programs}, options);
  at::Tensor divergences = at::empty({plan->layers}, options);
  std::optional<Factors> factors;
  if (save_factors) factors.emplace(sides, probabilities);

  const std::vector<bool> aligned = fill_addresses(plan->tiles, 0, {&sides.both.tensors}, plan->table);
  if (save_factors) {
    plan->table.fill(plan->factors, {&factors->compared});
    fill_addresses(plan->factor_resizing, 0, factors->compared, factors->own, plan->table);
  }
  plan->table.write(place);

  launch_partial_maps(place, plan->tiles, plan->table, aligned, power, power_code(power, probabilities), partials,
                      std::nullopt);
  launch_resize(place, plan->resizing, plan->table, partials);
  const at::Tensor sums = at::empty({plan->split.split ? plan->programs * kSums : 0}, options);
  for (const char* phase : phases(plan->split.split, kind, save_factors)) {
    const bool writes_factors = save_factors && (!plan->split.split || std::string_view(phase) == "factors");
    Arguments arguments;
    arguments.pointer(partials).pointer(plan->table.fixed(plan->layer_table)).pointer(plan->table.fixed(plan->ends));
    if (plan->split.split) arguments.pointer(sums);
    arguments.pointer(distances).pointer(plan->table.fixed(plan->counters)).pointer(divergences);
    if (writes_factors) arguments.pointer(plan->table.address(plan->factors));
    arguments.count(plan->layers).real(betas[0]).real(betas[1]);
    Variant variant("attention_divergence_fwd");
    variant.pointer("sums_ptr", plan->split.split).pointer("addresses_ptr", writes_factors);
    variant.set("KIND", kind == "jsd" ? "jsd" : "l2").set("PHASE", phase);
    variant.set("MORE", plan->split.block.more).set("BLOCK", plan->split.block.positions);
    launch(place, variant.warps(plan->split.block.warps), plan->programs, arguments);
  }
  if (!save_factors) return {divergences, {}};
  launch_resize_backward(place, plan->factor_resizing, plan->table, 0);
  return {divergences, factors->own};
}

struct BackwardPlan {
  TilePlan tiles;
  LayerTable table;

  explicit BackwardPlan(const std::vector<Geometry>& features) {
    Sections sections;
    tiles = plan_tiles(features, sections);
    add_addresses(tiles, 3, sections);
    table = LayerTable(sections);
  }
};

std::vector<at::Tensor> attention_divergence_backward_cuda(  //
    const at::Tensor& grad,                                  // (L,)
    at::TensorList student,                                  // L x (B, C, *spatial)
    at::TensorList factors,                                  // L x (B, N), or (B, N, N)
    c10::string_view source, double power) {
  const int64_t layers = static_cast<int64_t>(student.size());
  checks::divergence_backward_call(kBackward, grad, student, factors, source, power);
  const c10::Device device = student[0].device();
  checks::on_gpu(std::string("lwkd.ops.") + kBackward + ": grad", grad, device);
  Features features;
  for (int64_t l = 0; l < layers; ++l) {
    checks::feature(kBackward, "student", l, student[l]);
    checks::on_gpu(checks::at_layer(kBackward, l, "student"), student[l], device);
    checks::on_gpu(checks::at_layer(kBackward, l, "factor"), factors[l], device);
    features.add(student[l]);
    const Geometry& g = features.geometries[l];
    checks::weights(kBackward, l, "factor", factors[l], at::kFloat, g.samples * g.positions);
  }

  const Place place(student[0]);
  Plans<BackwardPlan>::Key key;
  for (const Geometry& g : features.geometries) g.add_to(key);
  auto plan = plans<BackwardPlan>().take(place, std::move(key),
                                         [&] { return std::make_unique<BackwardPlan>(features.geometries); });
  const at::Tensor grads = grad.to(at::kFloat).contiguous();
  const std::vector<at::Tensor> cotangents = factors.vec();
  Gradients<FeatureGradient> gradients;
  for (int64_t l = 0; l < layers; ++l) gradients.add(student[l], features.geometries[l]);
  const Operands operands = {&features.tensors, {&cotangents, /*wide=*/false}, &gradients.written};
  const std::vector<bool> aligned = fill_addresses(plan->tiles, 0, operands, plan->table);
  plan->table.write(place);
  launch_feature_gradients(place, plan->tiles, plan->table, 0, aligned, power,
                           power_code(power, source == "probabilities"), /*tangents=*/false, grads);
  return gradients.finish();
}

}  // namespace

TORCH_LIBRARY_IMPL(lwkd, CUDA, m) {
  m.impl("attention_divergence", attention_divergence_cuda);
  m.impl("attention_divergence_backward", attention_divergence_backward_cuda);
}

}  // namespace lwkd::cuda
