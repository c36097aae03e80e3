#include "map_sums.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <memory>

#include "work_queue.h"

namespace lwkd {
namespace {

// Where the partial maps of one source lie: (B, parts, [map, tangent], N). Tiles of channels have a part each; tiles of
// positions share one, in which each owns its positions.
struct Partials {
  Cut cut;
  int64_t parts, part_bytes, offset, maps_per_part;

  int64_t sample_bytes() const { return parts * part_bytes; }
};

template <class Acc>
void add_parts(char* first, int64_t parts, int64_t count) {
  Acc* sum = reinterpret_cast<Acc*>(first);
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < count; ++i) sum[i] += sum[part * count + i];
}

// The items of the queue are tiles: of all layers, in each of all samples.
struct Items {
  struct Item {
    int64_t layer, sample, tile;
  };

  std::vector<int64_t> ends;        // of the layers
  std::vector<int64_t> per_sample;  // tiles of one sample

  void add_layer(int64_t samples, int64_t tiles) {
    ends.push_back(total() + samples * tiles);
    per_sample.push_back(tiles);
  }
  int64_t total() const { return ends.empty() ? 0 : ends.back(); }
  Item at(int64_t index) const {
    const int64_t layer = std::upper_bound(ends.begin(), ends.end(), index) - ends.begin();
    const int64_t within = index - (layer == 0 ? 0 : ends[layer - 1]);
    return {layer, within / per_sample[layer], within % per_sample[layer]};
  }
};

}  // namespace

void sum_maps(const std::vector<MapSource>& sources, int64_t per_layer, double power,
              const std::function<void(int64_t, int64_t, const SampleMaps&)>& finish) {
  const int64_t layers = static_cast<int64_t>(sources.size()) / per_layer;
  int64_t bytes = 0, arena_bytes = 0, samples = 0;
  for (const MapSource& source : sources)
    bytes += source.feature.batch * source.feature.sample_bytes() * (source.has_tangent ? 2 : 1);
  std::vector<Partials> partials;
  std::vector<int64_t> first_sample;
  Items items;
  for (int64_t layer = 0; layer < layers; ++layer) {
    int64_t tiles = 0;
    for (int64_t side = 0; side < per_layer; ++side) {
      const MapSource& source = sources[layer * per_layer + side];
      const FeatureView& view = source.feature;
      Partials p;
      p.cut = cut_sample(view, tile_bytes_for(bytes));
      p.parts = view.channels_last ? 1 : p.cut.tiles;
      p.maps_per_part = source.has_tangent ? 2 : 1;
      const int64_t acc_bytes = static_cast<int64_t>(c10::elementSize(accumulation(view.dtype)));
      p.part_bytes = p.maps_per_part * view.positions * acc_bytes;
      p.offset = arena_bytes;
      arena_bytes += (view.batch * p.sample_bytes() + 63) / 64 * 64;
      tiles += p.cut.tiles;
      partials.push_back(p);
    }
    const int64_t batch = sources[layer * per_layer].feature.batch;
    items.add_layer(batch, tiles);
    first_sample.push_back(samples);
    samples += batch;
  }
  at::Tensor arena = at::empty({arena_bytes}, at::kByte);
  char* const base = static_cast<char*>(arena.mutable_data_ptr());
  const auto pending = std::make_unique<std::atomic<int64_t>[]>(samples);
  for (int64_t layer = 0; layer < layers; ++layer)
    for (int64_t b = 0; b < sources[layer * per_layer].feature.batch; ++b)
      pending[first_sample[layer] + b].store(items.per_sample[layer], std::memory_order_relaxed);

  run_items(items.total(), bytes, [&](int64_t item) {
    auto [layer, sample, tile] = items.at(item);
    int64_t index = layer * per_layer;
    while (tile >= partials[index].cut.tiles) tile -= partials[index++].cut.tiles;
    const MapSource& source = sources[index];
    const Partials& p = partials[index];
    char* part = base + p.offset + sample * p.sample_bytes() + (p.parts == 1 ? 0 : tile) * p.part_bytes;
    sum_tile({&source.feature, source.has_tangent ? &source.tangent : nullptr, sample, p.cut.range(tile), power}, part,
             part + p.part_bytes / p.maps_per_part);
    if (pending[first_sample[layer] + sample].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    SampleMaps maps;
    for (int64_t side = 0; side < per_layer; ++side) {
      const Partials& q = partials[layer * per_layer + side];
      const FeatureView& view = sources[layer * per_layer + side].feature;
      char* first = base + q.offset + sample * q.sample_bytes();
      with_accumulation(view.dtype,
                        [&](auto acc) { add_parts<decltype(acc)>(first, q.parts, q.maps_per_part * view.positions); });
      maps.push_back(first);
    }
    finish(layer, sample, maps);
  });
}

void scale_features(const std::vector<GradientTarget>& targets, double power) {
  int64_t bytes = 0;
  for (const GradientTarget& target : targets)
    bytes += target.source.feature.batch * target.source.feature.sample_bytes() * (target.source.has_tangent ? 4 : 2);
  std::vector<Cut> cuts;
  Items items;
  for (const GradientTarget& target : targets) {
    cuts.push_back(cut_sample(target.source.feature, tile_bytes_for(bytes)));
    items.add_layer(target.source.feature.batch, cuts.back().tiles);
  }
  run_items(items.total(), bytes, [&](int64_t item) {
    const auto [layer, sample, tile] = items.at(item);
    const GradientTarget& target = targets[layer];
    const FeatureView& view = target.source.feature;
    const int64_t weight_bytes =
        sample * view.positions * static_cast<int64_t>(c10::elementSize(accumulation(view.dtype)));
    const bool tangent = target.source.has_tangent;
    scale_tile({&view, tangent ? &target.source.tangent : nullptr, sample, cuts[layer].range(tile), power},
               target.weights + weight_bytes, tangent ? target.tangent_weights + weight_bytes : nullptr, target.scale,
               target.grad, tangent ? &target.grad_tangent : nullptr);
  });
}

}  // namespace lwkd
