#include "attention_resize.h"

namespace lwkd::cuda {
namespace {

constexpr int64_t kBlock = 256;  // map positions a program resizes
constexpr int64_t kWarps = 4;

}  // namespace

ResizePlan plan_resize(const std::vector<Geometry>& features, const TilePlan& tiles, const std::vector<Size3>& sizes,
                       Sections& sections) {
  ResizePlan plan;
  plan.places = tiles.places;
  plan.length = tiles.partials;
  std::vector<int64_t> table, ends, backward_ends;
  for (size_t index = 0; index < features.size(); ++index) {
    const Geometry& g = features[index];
    const Size3& size = sizes[index];
    if (g.size == size) continue;
    const MapPlace from = plan.places[index];
    const int64_t positions = positions_of(size);
    plan.features.push_back(static_cast<int64_t>(index));
    // Fields as the kernels read them.
    table.insert(table.end(),
                 {from.offset, from.partials, g.size[0], g.size[1], g.size[2], size[0], size[1], size[2], plan.length});
    plan.programs += g.samples * ceil_div(positions, kBlock);
    plan.backward_programs += g.samples * ceil_div(g.positions, kBlock);
    ends.push_back(plan.programs);
    backward_ends.push_back(plan.backward_programs);
    plan.places[index] = {plan.length, 1};
    plan.length += g.samples * positions;
  }
  plan.table = sections.add(table);
  plan.ends = sections.add(ends);
  plan.backward_ends = sections.add(backward_ends);
  return plan;
}

void add_addresses(ResizePlan& plan, Sections& sections) {
  plan.addresses.push_back(sections.add_addresses(2 * static_cast<int64_t>(plan.features.size())));
}

void launch_resize(const Place& place, const ResizePlan& plan, const LayerTable& table, const at::Tensor& partials) {
  if (plan.none()) return;
  Arguments arguments;
  arguments.pointer(partials).pointer(table.fixed(plan.table)).pointer(table.fixed(plan.ends));
  arguments.count(static_cast<int64_t>(plan.features.size()));
  launch(place, Variant("attention_resize_fwd").set("BLOCK", kBlock).warps(kWarps), plan.programs, arguments);
}

void fill_addresses(const ResizePlan& plan, size_t number, const std::vector<at::Tensor>& resized,
                    const std::vector<at::Tensor>& own, LayerTable& table) {
  table.fill(plan.addresses[number], plan.features, {&resized, &own});
}

void launch_resize_backward(const Place& place, const ResizePlan& plan, const LayerTable& table, size_t number) {
  if (plan.none()) return;
  Arguments arguments = table.arguments(plan.addresses[number], plan.table, plan.backward_ends);
  arguments.count(static_cast<int64_t>(plan.features.size()));
  launch(place, Variant("attention_resize_bwd").set("BLOCK", kBlock).warps(kWarps), plan.backward_programs, arguments);
}

}  // namespace lwkd::cuda
