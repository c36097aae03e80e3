#include "attention_tiles.h"

#include <algorithm>
#include <numeric>

namespace lwkd::cuda {
namespace {

constexpr int64_t kLineBytes = 128;  // of one row of a tile of a channels-last feature: one memory transaction
constexpr int64_t kStep = 2048;      // elements a program reads at a time: 16 a thread, which keeps the registers few
constexpr int64_t kSmallestTile = 8192, kLargestTile = 65536;  // bytes that one program reads in all
constexpr int64_t kPrograms = 132 * 8;  // that keep a large GPU busy: processors times resident programs
constexpr int64_t kWarps = 4;

struct TileShape {
  int64_t rows, columns;
};

// What one program reads in one step. Loads that are not aligned are narrow and need an address each, and registers for
// it, hence half as much; only the summed dimension shrinks, so that a plan's blocks and chunks hold for both.
TileShape tile_shape(at::ScalarType dtype, bool channels_last, bool aligned) {
  if (!channels_last) return {kStep / kTileColumns / (aligned ? 1 : 2), kTileColumns};
  const int64_t columns = kLineBytes / static_cast<int64_t>(c10::elementSize(dtype));
  return {kStep / columns, columns / (aligned ? 1 : 2)};
}

// Rows of a forward step whose loads are wide. Fewer leave more registers to loads that are on their way, as an H200
// showed (benchmarks/results/nvidia-h200); logarithms are read ahead through shared memory instead.
int64_t forward_rows(at::ScalarType dtype, bool tangents, int64_t code, int64_t rows) {
  if (code == kAnyPower) return rows;
  if (c10::elementSize(dtype) == 2) return rows / 4;
  return tangents ? rows : rows / 2;
}

struct Row {
  int64_t feature, programs, positions;
  std::vector<int64_t> fields;
};

// TILE_FIELDS, as the kernels read them: sample stride, rows, columns, rows or columns per chunk, chunks, blocks, N,
// offset of the partial maps.
Row row_of(int64_t index, const Geometry& g, int64_t tile_bytes, TilePlan& plan) {
  const TileShape tile = tile_shape(g.dtype, g.channels_last, true);
  const int64_t rows = g.rows(), columns = g.columns();
  const int64_t summed = g.channels_last ? columns : rows, step = g.channels_last ? tile.columns : tile.rows;
  const int64_t blocks = g.channels_last ? ceil_div(rows, tile.rows) : ceil_div(columns, tile.columns);
  const int64_t steps = ceil_div(summed, step);
  int64_t chunks = std::min(ceil_div(steps * kStep * g.item_bytes(), tile_bytes), kMostPartials / g.fold());
  const int64_t chunk = ceil_div(steps, chunks) * step;
  chunks = ceil_div(summed, chunk);
  Row row = {index,
             g.samples * chunks * blocks,
             g.positions,
             {g.sample_stride, rows, columns, chunk, chunks, blocks, g.positions, plan.partials}};
  plan.places.push_back({plan.partials, chunks * g.fold()});
  plan.partials += g.samples * chunks * g.fold() * g.positions;
  return row;
}

TileGroup group_of(const Geometry& g, std::vector<Row> rows, Sections& sections) {
  std::stable_sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) { return a.positions > b.positions; });
  TileGroup group = {g.dtype, g.channels_last, g.wide(), {}, 0, 0, 0, 0, {}};
  std::vector<int64_t> table, ends;
  for (const Row& row : rows) {
    group.features.push_back(row.feature);
    table.insert(table.end(), row.fields.begin(), row.fields.end());
    group.programs += row.programs;
    ends.push_back(group.programs);
  }
  group.table = sections.add(table);
  group.ends = sections.add(ends);
  group.layers = sections.add(group.features);
  return group;
}

void add_constants(Variant& variant, const TileGroup& group, bool aligned, int64_t code, bool forward, bool tangents) {
  TileShape tile = tile_shape(group.dtype, group.channels_last, aligned);
  if (forward && aligned && !group.channels_last) tile.rows = forward_rows(group.dtype, tangents, code, tile.rows);
  variant.set("ELEMENT", element_of(group.dtype)).set("CHANNELS_LAST", group.channels_last).set("ALIGNED", aligned);
  if (!forward) variant.set("TANGENT", tangents);
  variant.set("POWER", code).set("ROWS", tile.rows).set("COLUMNS", tile.columns);
}

}  // namespace

TilePlan plan_tiles(const std::vector<Geometry>& features, Sections& sections) {
  int64_t bytes = 0;
  for (const Geometry& g : features) bytes += g.samples * g.channels * g.positions * g.item_bytes();
  const int64_t tile_bytes = std::clamp(bytes / kPrograms, kSmallestTile, kLargestTile);
  TilePlan plan;
  std::vector<std::pair<const Geometry*, std::vector<Row>>> members;  // in the order in which they are met
  for (size_t index = 0; index < features.size(); ++index) {
    const Geometry& g = features[index];
    auto alike = std::find_if(members.begin(), members.end(), [&](const auto& member) {
      const Geometry& other = *member.first;
      return other.dtype == g.dtype && other.channels_last == g.channels_last && other.wide() == g.wide();
    });
    if (alike == members.end()) alike = members.insert(members.end(), {&g, {}});
    alike->second.push_back(row_of(static_cast<int64_t>(index), g, tile_bytes, plan));
  }
  for (auto& [geometry, rows] : members) plan.groups.push_back(group_of(*geometry, std::move(rows), sections));
  return plan;
}

void add_addresses(TilePlan& plan, int64_t operands, Sections& sections) {
  for (TileGroup& group : plan.groups)
    group.addresses.push_back(sections.add_addresses(operands * static_cast<int64_t>(group.features.size())));
}

std::vector<bool> fill_addresses(const TilePlan& plan, size_t number, const Operands& operands, LayerTable& table) {
  std::vector<bool> aligned;
  for (const TileGroup& group : plan.groups)
    aligned.push_back(table.fill(group.addresses[number], group.features, operands) && group.wide);
  return aligned;
}

void launch_partial_maps(const Place& place, const TilePlan& plan, const LayerTable& table,
                         const std::vector<bool>& aligned, double power, int64_t code, const at::Tensor& partials,
                         const std::optional<at::Tensor>& tangent_partials) {
  for (size_t index = 0; index < plan.groups.size(); ++index) {
    const TileGroup& group = plan.groups[index];
    Variant variant("attention_tiles_fwd");
    variant.pointer("tangent_partials_ptr", tangent_partials.has_value());
    Arguments arguments = table.arguments(group.addresses[0], group.table, group.ends);
    arguments.pointer(partials);
    if (tangent_partials.has_value()) arguments.pointer(*tangent_partials);
    arguments.count(static_cast<int64_t>(group.features.size())).real(power);
    add_constants(variant, group, aligned[index], code, /*forward=*/true, tangent_partials.has_value());
    launch(place, variant.warps(kWarps), group.programs, arguments);
  }
}

void launch_feature_gradients(const Place& place, const TilePlan& plan, const LayerTable& table, size_t number,
                              const std::vector<bool>& aligned, double power, int64_t code, bool tangents,
                              const std::optional<at::Tensor>& grad) {
  for (size_t index = 0; index < plan.groups.size(); ++index) {
    const TileGroup& group = plan.groups[index];
    Variant variant("attention_tiles_bwd");
    variant.pointer("grad_ptr", grad.has_value());
    Arguments arguments = table.arguments(group.addresses[number], group.table, group.ends);
    arguments.pointer(table.fixed(group.layers));
    if (grad.has_value()) arguments.pointer(*grad);
    arguments.count(static_cast<int64_t>(group.features.size())).real(power);
    add_constants(variant, group, aligned[index], code, /*forward=*/false, tangents);
    launch(place, variant.warps(kWarps), group.programs, arguments);
  }
}

}  // namespace lwkd::cuda
