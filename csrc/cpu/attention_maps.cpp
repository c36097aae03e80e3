// attention_maps on the CPU, forward and backward. Legend: L layers, B batch, C channels, N positions.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "area_average.h"
#include "map_divergence.h"
#include "map_sums.h"

namespace lwkd {
namespace {

struct Layer {
  Size3 own_size, size;
  at::Tensor keep_feature, keep_tangent;
};

// Features, their tangents and the sizes of their maps, checked and ready to be walked.
struct Input {
  std::vector<Layer> layers;
  std::vector<MapSource> sources;
};

Input read_input(const char* op, at::TensorList features, at::TensorList tangents, double power,
                 at::IntArrayRef sizes) {
  checks::maps_call(op, features, tangents, power, sizes);
  Input input;
  for (size_t l = 0; l < features.size(); ++l) {
    const at::Tensor& feature = features[l];
    const at::IntArrayRef size = sizes.slice(0, feature.dim() - 2);
    sizes = sizes.slice(feature.dim() - 2);
    checks::size(op, static_cast<int64_t>(l), size);
    Layer layer;
    layer.own_size = padded(feature.sizes().slice(2));
    layer.size = padded(size);
    MapSource source;
    source.feature = readable(feature, accumulation(feature.scalar_type()), layer.keep_feature);
    if (!tangents.empty()) {
      source.tangent = readable_beside(source.feature, tangents[l], layer.keep_tangent);
      source.has_tangent = true;
    }
    input.layers.push_back(std::move(layer));
    input.sources.push_back(source);
  }
  return input;
}

// Normalises the map of one sample and its tangent, which becomes (dr - q sum(dr)) / sum(r), in place. Returns sum(r),
// 0 for an empty map, and sum(dr).
template <class Acc>
std::pair<Acc, Acc> normalise(Acc* map, Acc* tangent, int64_t n) {
  Acc total;
  normalise_rows(map, 1, n, &total);
  return {total, tangent == nullptr ? Acc(0) : normalise_tangent(tangent, map, n, total)};
}

template <class Acc>
void write_maps(const Layer& layer, int64_t sample, const MapSource& source, void* sums, at::Tensor& map,
                at::Tensor* tangent) {
  const int64_t n = positions_of(layer.size);
  const Acc* own = static_cast<const Acc*>(sums);
  Acc* map_out = map.mutable_data_ptr<Acc>() + sample * n;
  Acc* tangent_out = tangent ? tangent->mutable_data_ptr<Acc>() + sample * n : nullptr;
  area_average(own, layer.own_size, map_out, layer.size);
  if (tangent) area_average(own + source.feature.positions, layer.own_size, tangent_out, layer.size);
  normalise(map_out, tangent_out, n);
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> attention_maps_cpu(  //
    at::TensorList features,                                                      // L x (B, C, *spatial)
    at::TensorList tangents,                                                      // the same, or empty
    double power, at::IntArrayRef sizes) {
  const Input input = read_input("attention_maps", features, tangents, power, sizes);
  std::vector<at::Tensor> maps, map_tangents;
  for (size_t l = 0; l < features.size(); ++l) {
    const auto options = at::TensorOptions().dtype(accumulation(features[l].scalar_type()));
    maps.push_back(at::empty({features[l].size(0), positions_of(input.layers[l].size)}, options));
    if (!tangents.empty()) map_tangents.push_back(at::empty_like(maps.back()));
  }
  sum_maps(input.sources, 1, power, [&](int64_t l, int64_t sample, const SampleMaps& sums) {
    at::Tensor* tangent = tangents.empty() ? nullptr : &map_tangents[l];
    with_accumulation(maps[l].scalar_type(), [&](auto acc) {
      write_maps<decltype(acc)>(input.layers[l], sample, input.sources[l], sums[0], maps[l], tangent);
    });
  });
  return {maps, map_tangents};
}

template <class Acc>
void write_weights(const Layer& layer, int64_t sample, const MapSource& source, void* sums, const at::Tensor& grad_map,
                   const at::Tensor* grad_tangent, at::Tensor& weight, at::Tensor* tangent_weight) {
  const int64_t n = positions_of(layer.size), own = source.feature.positions;
  std::vector<Acc> room(2 * n), slope(n), tangent_slope(tangent_weight ? n : 0);
  const Acc* h = grad_tangent ? grad_tangent->const_data_ptr<Acc>() + sample * n : nullptr;
  const auto at_map_size = [&](Acc* sum, Acc* resized) {
    if (layer.own_size == layer.size) return sum;
    area_average(sum, layer.own_size, resized, layer.size);
    return resized;
  };
  Acc* map = at_map_size(static_cast<Acc*>(sums), room.data());
  Acc* tangent = tangent_weight ? at_map_size(static_cast<Acc*>(sums) + own, room.data() + n) : nullptr;
  const auto [total, tangent_total] = normalise(map, tangent, n);
  const Normalised<Acc> of = {map, tangent, n, total, tangent_total};
  through_map(of, grad_map.const_data_ptr<Acc>() + sample * n, h, slope.data(), tangent_slope.data());
  const auto write_at_own_size = [&](const std::vector<Acc>& from, at::Tensor& to) {
    area_average_transposed(from.data(), layer.size, to.mutable_data_ptr<Acc>() + sample * own, layer.own_size);
  };
  write_at_own_size(slope, weight);
  if (tangent_weight) write_at_own_size(tangent_slope, *tangent_weight);
}

// One sample's map and its tangent at one position, before the map was normalised.
struct SumsAt {
  const MapSource& source;
  int64_t sample, position;
  double *sum, *moved;

  template <class T, class Acc, class Power>
  void run(Power power) const {
    const FeatureView &view = source.feature, &beside = source.tangent;
    const T* channel = reinterpret_cast<const T*>(view.sample(sample)) + position * view.position_stride;
    for (int64_t c = 0; c < view.channels; ++c)
      *sum += static_cast<double>(power.value(Acc(channel[c * view.channel_stride])));
    if (!source.has_tangent) return;
    const T* moving = reinterpret_cast<const T*>(beside.sample(sample)) + position * beside.position_stride;
    for (int64_t c = 0; c < view.channels; ++c)
      *moved += static_cast<double>(power.slope(Acc(channel[c * view.channel_stride]))) *
                static_cast<double>(Acc(moving[c * beside.channel_stride]));
  }
};

std::pair<double, double> sums_at(const MapSource& source, int64_t sample, int64_t position, double power) {
  double sum = 0, moved = 0;
  with_dtype(source.feature.dtype, WithPower<SumsAt>{power, {source, sample, position, &sum, &moved}});
  return {sum, moved};
}

// What normalising did to a map q and its tangent dq (null: none). One position tells: R = r / q, and the sum of the
// tangent is (dr - R dq) / q. Where R is so small that the map may count as empty, all positions are summed.
template <class Acc>
Normalised<Acc> normalised(const MapSource& source, int64_t sample, const Acc* map, const Acc* tangent, double power) {
  const int64_t n = source.feature.positions;
  const Acc* share = std::find_if(map, map + n, [n](Acc q) { return q * n >= Acc(0.5); });  // the mean of q n is 1
  const int64_t position = share == map + n ? 0 : share - map;  // in a map of NaN no position is found
  const auto [sum, moved] = sums_at(source, sample, position, power);
  const double q = static_cast<double>(map[position]);
  double total = sum / q;
  if (total < 2 * static_cast<double>(n) * kEmptyMap) {
    total = 0;
    for (int64_t i = 0; i < n; ++i) total += sums_at(source, sample, i, power).first;
    if (total < kEmptyMap) total = 0;
  }
  const double all_moved = tangent ? (moved - total * static_cast<double>(tangent[position])) / q : 0;
  return {map, tangent, n, Acc(total), Acc(all_moved)};
}

// As write_weights without resizing, from the map and its tangent as forward left them: features are not read again.
void write_weights_from_maps(const MapSource& source, int64_t sample, const at::Tensor& map,
                             const at::Tensor* map_tangent, const at::Tensor& grad_map, const at::Tensor* grad_tangent,
                             double power, at::Tensor& weight, at::Tensor* tangent_weight) {
  with_accumulation(weight.scalar_type(), [&](auto acc) {
    using Acc = decltype(acc);
    const int64_t n = source.feature.positions, begin = sample * n;
    const auto of_sample = [&](const at::Tensor* t) { return t ? t->const_data_ptr<Acc>() + begin : nullptr; };
    through_map(normalised(source, sample, of_sample(&map), of_sample(map_tangent), power), of_sample(&grad_map),
                of_sample(grad_tangent), weight.mutable_data_ptr<Acc>() + begin,
                tangent_weight ? tangent_weight->mutable_data_ptr<Acc>() + begin : nullptr);
  });
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> attention_maps_backward_cpu(  //
    at::TensorList grad_maps,                                                              // L x (B, N)
    at::TensorList grad_map_tangents,                                                      // the same, or empty
    at::TensorList features,                                                               // L x (B, C, *spatial)
    at::TensorList tangents,                                                               // the same, or empty
    double power, at::IntArrayRef sizes,
    at::TensorList maps) {  // L x (B, N) and, with tangents, behind them those of the maps; or empty
  constexpr const char* kOp = "attention_maps_backward";
  const Input input = read_input(kOp, features, tangents, power, sizes);
  const bool has_tangents = !tangents.empty();
  const int64_t layers = static_cast<int64_t>(features.size());
  checks::map_gradients(kOp, features, grad_maps, tangents, grad_map_tangents);
  std::vector<at::Tensor> grads_in, tangent_grads_in, weights, tangent_weights;
  for (int64_t l = 0; l < layers; ++l) {
    const at::ScalarType acc = accumulation(features[l].scalar_type());
    const int64_t n = positions_of(input.layers[l].size), batch = features[l].size(0);
    grads_in.push_back(grad_maps[l].to(acc).contiguous());
    checks::weights(kOp, l, "map gradient", grads_in[l], acc, batch * n);
    weights.push_back(at::empty({batch, positions_of(features[l])}, at::TensorOptions().dtype(acc)));
    if (!has_tangents) continue;
    tangent_grads_in.push_back(grad_map_tangents[l].to(acc).contiguous());
    checks::weights(kOp, l, "map tangent gradient", tangent_grads_in[l], acc, batch * n);
    tangent_weights.push_back(at::empty_like(weights.back()));
  }
  // Layers whose maps forward has kept, and the others, whose features are read for them.
  std::vector<int64_t> known, others;
  std::vector<MapSource> unread;
  if (!maps.empty())
    checks::same_layers(kOp, "features and tangents", static_cast<int64_t>(features.size() + tangents.size()), "maps",
                        static_cast<int64_t>(maps.size()));
  for (int64_t l = 0; l < layers; ++l) {
    if (!maps.empty() && input.layers[l].own_size == input.layers[l].size) {
      for (size_t i = l; i < maps.size(); i += layers)
        checks::weights(kOp, l, "map", maps[i], weights[l].scalar_type(), weights[l].numel());
      known.push_back(l);
    } else {
      others.push_back(l);
      unread.push_back(input.sources[l]);
    }
  }
  const auto tangent_grad = [&](int64_t l) { return has_tangents ? &tangent_grads_in[l] : nullptr; };
  const auto tangent_weight = [&](int64_t l) { return has_tangents ? &tangent_weights[l] : nullptr; };
  for (const int64_t l : known) {
    const FeatureView& view = input.sources[l].feature;
    const at::Tensor* map_tangent = has_tangents ? &maps[layers + l] : nullptr;
    at::parallel_for(0, view.batch, 1 + (1 << 15) / (view.positions + view.channels), [&](int64_t begin, int64_t end) {
      for (int64_t sample = begin; sample < end; ++sample)
        write_weights_from_maps(input.sources[l], sample, maps[l], map_tangent, grads_in[l], tangent_grad(l), power,
                                weights[l], tangent_weight(l));
    });
  }
  if (!others.empty())
    sum_maps(unread, 1, power, [&](int64_t i, int64_t sample, const SampleMaps& sums) {
      const int64_t l = others[i];
      with_accumulation(weights[l].scalar_type(), [&](auto acc) {
        write_weights<decltype(acc)>(input.layers[l], sample, input.sources[l], sums[0], grads_in[l], tangent_grad(l),
                                     weights[l], tangent_weight(l));
      });
    });

  Gradients<FeatureGradient> gradients, tangent_gradients;
  std::vector<GradientTarget> targets;
  for (int64_t l = 0; l < layers; ++l) {
    GradientTarget target;
    target.source = input.sources[l];
    target.weights = static_cast<const char*>(weights[l].const_data_ptr());
    target.grad = gradients.add(features[l], target.source.feature).view;
    if (has_tangents) {
      target.tangent_weights = static_cast<const char*>(tangent_weights[l].const_data_ptr());
      target.grad_tangent = tangent_gradients.add(tangents[l], target.source.feature).view;
    }
    targets.push_back(target);
  }
  scale_features(targets, power);
  return {gradients.finish(), tangent_gradients.finish()};
}

}  // namespace

TORCH_LIBRARY_IMPL(lwkd, CPU, m) {
  m.impl("attention_maps", attention_maps_cpu);
  m.impl("attention_maps_backward", attention_maps_backward_cpu);
}

}  // namespace lwkd
