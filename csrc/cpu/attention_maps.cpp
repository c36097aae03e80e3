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

template <class Acc>
double dot(const Acc* a, const Acc* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
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

// With q = r / R and dq = (dr - q sum(dr)) / R, gradients g of q and h of dq go back as
//   d(dr) = (h - sum(h q)) / R,   dr = (g' - sum(g' q) - sum(h dq)) / R  with  g' = g - h sum(dr) / R;
// both are 0 for an empty map.
template <class Acc>
void write_weights(const Layer& layer, int64_t sample, const MapSource& source, void* sums, const at::Tensor& grad_map,
                   const at::Tensor* grad_tangent, at::Tensor& weight, at::Tensor* tangent_weight) {
  const int64_t n = positions_of(layer.size), own = source.feature.positions;
  std::vector<Acc> room(2 * n), slope(n), tangent_slope(tangent_weight ? n : 0);
  const auto at_map_size = [&](Acc* sum, Acc* resized) {
    if (layer.own_size == layer.size) return sum;
    area_average(sum, layer.own_size, resized, layer.size);
    return resized;
  };
  Acc* map = at_map_size(static_cast<Acc*>(sums), room.data());
  Acc* tangent = tangent_weight ? at_map_size(static_cast<Acc*>(sums) + own, room.data() + n) : nullptr;
  const auto [total, tangent_total] = normalise(map, tangent, n);
  std::copy_n(grad_map.const_data_ptr<Acc>() + sample * n, n, slope.data());
  Acc offset = 0;
  if (tangent_weight) {
    std::copy_n(grad_tangent->const_data_ptr<Acc>() + sample * n, n, tangent_slope.data());
    offset = Acc(dot(tangent_slope.data(), tangent, n));
    for (int64_t i = 0; i < n; ++i) slope[i] -= total == 0 ? Acc(0) : tangent_slope[i] * (tangent_total / total);
    through_normalising(tangent_slope.data(), map, n, total, Acc(0), Acc(1));
  }
  through_normalising(slope.data(), map, n, total, offset, Acc(1));
  const auto write_at_own_size = [&](const std::vector<Acc>& from, at::Tensor& to) {
    area_average_transposed(from.data(), layer.size, to.mutable_data_ptr<Acc>() + sample * own, layer.own_size);
  };
  write_at_own_size(slope, weight);
  if (tangent_weight) write_at_own_size(tangent_slope, *tangent_weight);
}

// One sample's map at one position, before it was normalised.
struct SumAt {
  const FeatureView& view;
  int64_t sample, position;
  double* sum;

  template <class T, class Acc, class Power>
  void run(Power power) const {
    const T* channel = reinterpret_cast<const T*>(view.sample(sample)) + position * view.position_stride;
    for (int64_t c = 0; c < view.channels; ++c)
      *sum += static_cast<double>(power.value(Acc(channel[c * view.channel_stride])));
  }
};

double sum_at(const FeatureView& view, int64_t sample, int64_t position, double power) {
  double sum = 0;
  with_dtype(view.dtype, WithPower<SumAt>{power, {view, sample, position, &sum}});
  return sum;
}

// What normalising divided a map of n positions by, 0 for an empty map. One position tells: its sum over its share.
// Where that is so small that the map may count as empty, all positions are summed.
template <class Acc>
Acc total_of(const FeatureView& view, int64_t sample, const Acc* map, int64_t n, double power) {
  const Acc* share = std::find_if(map, map + n, [n](Acc q) { return q * n >= Acc(0.5); });  // the mean of q n is 1
  const int64_t position = share == map + n ? 0 : share - map;  // in a map of NaN no position is found
  const double total = sum_at(view, sample, position, power) / static_cast<double>(map[position]);
  if (!(total < 2 * static_cast<double>(n) * kEmptyMap)) return Acc(total);
  double all = 0;
  for (int64_t i = 0; i < n; ++i) all += sum_at(view, sample, i, power);
  return Acc(all < kEmptyMap ? 0 : all);
}

// As write_weights without tangents and resizing, from the normalised map: the feature is not read again.
void write_weights_from_map(const FeatureView& view, int64_t sample, const at::Tensor& map, const at::Tensor& grad_map,
                            double power, at::Tensor& weight) {
  with_accumulation(weight.scalar_type(), [&](auto acc) {
    using Acc = decltype(acc);
    const int64_t n = view.positions;
    const Acc* q = map.const_data_ptr<Acc>() + sample * n;
    Acc* slope = weight.mutable_data_ptr<Acc>() + sample * n;
    std::copy_n(grad_map.const_data_ptr<Acc>() + sample * n, n, slope);
    through_normalising(slope, q, n, total_of(view, sample, q, n, power), Acc(0), Acc(1));
  });
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> attention_maps_backward_cpu(  //
    at::TensorList grad_maps,                                                              // L x (B, N)
    at::TensorList grad_map_tangents,                                                      // the same, or empty
    at::TensorList features,                                                               // L x (B, C, *spatial)
    at::TensorList tangents,                                                               // the same, or empty
    double power, at::IntArrayRef sizes,
    at::TensorList maps) {  // L x (B, N), or empty
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
  if (!maps.empty()) checks::same_layers(kOp, "features", layers, "maps", static_cast<int64_t>(maps.size()));
  for (int64_t l = 0; l < layers; ++l) {
    if (!maps.empty() && !has_tangents && input.layers[l].own_size == input.layers[l].size) {
      checks::weights(kOp, l, "map", maps[l], weights[l].scalar_type(), weights[l].numel());
      known.push_back(l);
    } else {
      others.push_back(l);
      unread.push_back(input.sources[l]);
    }
  }
  for (const int64_t l : known) {
    const FeatureView& view = input.sources[l].feature;
    at::parallel_for(0, view.batch, 1 + (1 << 15) / (view.positions + view.channels), [&](int64_t begin, int64_t end) {
      for (int64_t sample = begin; sample < end; ++sample)
        write_weights_from_map(view, sample, maps[l], grads_in[l], power, weights[l]);
    });
  }
  if (!others.empty())
    sum_maps(unread, 1, power, [&](int64_t i, int64_t sample, const SampleMaps& sums) {
      const int64_t l = others[i];
      const at::Tensor* tangent_grad = has_tangents ? &tangent_grads_in[l] : nullptr;
      at::Tensor* tangent_weight = has_tangents ? &tangent_weights[l] : nullptr;
      with_accumulation(weights[l].scalar_type(), [&](auto acc) {
        write_weights<decltype(acc)>(input.layers[l], sample, input.sources[l], sums[0], grads_in[l], tangent_grad,
                                     weights[l], tangent_weight);
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
