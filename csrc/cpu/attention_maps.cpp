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

// The map of one sample, of its own size, becomes the one that is returned, and its tangent becomes that map's:
// (dr - q sum(dr)) / sum(r). totals receives sum(r), 0 for an empty map, and sum(dr).
template <class Acc>
void write_maps(const Layer& layer, int64_t sample, const MapSource& source, void* own, at::Tensor& map,
                at::Tensor* tangent, double* totals) {
  const int64_t n = positions_of(layer.size);
  const Acc* from = static_cast<const Acc*>(own);
  Acc* map_out = map.mutable_data_ptr<Acc>() + sample * n;
  area_average(from, layer.own_size, map_out, layer.size);
  Acc total;
  normalise_rows(map_out, 1, n, &total);
  totals[0] = total;
  if (tangent == nullptr) return;
  Acc* tangent_out = tangent->mutable_data_ptr<Acc>() + sample * n;
  area_average(from + source.feature.positions, layer.own_size, tangent_out, layer.size);
  totals[1] = normalise_tangent(tangent_out, map_out, n, total);
}

// The rows of the totals (samples of all layers, 1, or 2 with tangents) at which layers begin, and their number.
std::vector<int64_t> first_rows(at::TensorList features) {
  std::vector<int64_t> first = {0};
  for (const at::Tensor& feature : features) first.push_back(first.back() + feature.size(0));
  return first;
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, at::Tensor> attention_maps_cpu(  //
    at::TensorList features,                                                                  // L x (B, C, *spatial)
    at::TensorList tangents,                                                                  // the same, or empty
    double power, at::IntArrayRef sizes) {
  const Input input = read_input("attention_maps", features, tangents, power, sizes);
  std::vector<at::Tensor> maps, map_tangents;
  for (size_t l = 0; l < features.size(); ++l) {
    const auto options = at::TensorOptions().dtype(accumulation(features[l].scalar_type()));
    maps.push_back(at::empty({features[l].size(0), positions_of(input.layers[l].size)}, options));
    if (!tangents.empty()) map_tangents.push_back(at::empty_like(maps.back()));
  }
  const std::vector<int64_t> first = first_rows(features);
  const int64_t columns = tangents.empty() ? 1 : 2;
  const at::Tensor totals = at::empty({first.back(), columns}, at::kDouble);
  double* const rows = totals.mutable_data_ptr<double>();
  sum_maps(input.sources, 1, power, [&](int64_t l, int64_t sample, const SampleMaps& own) {
    at::Tensor* tangent = tangents.empty() ? nullptr : &map_tangents[l];
    with_accumulation(maps[l].scalar_type(), [&](auto acc) {
      write_maps<decltype(acc)>(input.layers[l], sample, input.sources[l], own[0], maps[l], tangent,
                                rows + (first[l] + sample) * columns);
    });
  });
  return {maps, map_tangents, totals};
}

// What forward returned of one side of a layer, a map or its tangent, the gradient of it, and the weights that the
// gradient of the feature is made of: all (B, N), weights at the feature's own size.
struct MapGradient {
  at::Tensor map, grad, weight;
};

// Weights of one sample.
template <class Acc>
void write_weights(const Layer& layer, int64_t sample, const MapGradient& of, const MapGradient* of_tangent,
                   const double* totals) {
  const int64_t n = positions_of(layer.size), own = positions_of(layer.own_size);
  const bool resized = layer.own_size != layer.size;
  std::vector<Acc> room(resized ? 2 * n : 0);
  const auto at = [&](const at::Tensor& t) { return t.const_data_ptr<Acc>() + sample * n; };
  const auto out = [&](const MapGradient& side) { return side.weight.mutable_data_ptr<Acc>() + sample * own; };
  Acc *slope = resized ? room.data() : out(of), *tangent_slope = nullptr;
  if (of_tangent) tangent_slope = resized ? room.data() + n : out(*of_tangent);
  const Normalised<Acc> normalised = {at(of.map), of_tangent ? at(of_tangent->map) : nullptr, n, Acc(totals[0]),
                                      of_tangent ? Acc(totals[1]) : Acc(0)};
  through_map(normalised, at(of.grad), of_tangent ? at(of_tangent->grad) : nullptr, slope, tangent_slope);
  if (!resized) return;
  area_average_transposed(slope, layer.size, out(of), layer.own_size);
  if (of_tangent) area_average_transposed(tangent_slope, layer.size, out(*of_tangent), layer.own_size);
}

constexpr const char* kBackward = "attention_maps_backward";

// One side of all layers.
std::vector<MapGradient> map_gradients(const Input& input, at::TensorList features, at::TensorList maps,
                                       at::TensorList grad_maps, const char* what, const char* what_grad) {
  std::vector<MapGradient> sides;
  for (size_t l = 0; l < features.size(); ++l) {
    const at::ScalarType acc = accumulation(features[l].scalar_type());
    const int64_t n = positions_of(input.layers[l].size), batch = features[l].size(0);
    MapGradient side = {maps[l], grad_maps[l].to(acc).contiguous(), {}};
    checks::weights(kBackward, static_cast<int64_t>(l), what, side.map, acc, batch * n);
    checks::weights(kBackward, static_cast<int64_t>(l), what_grad, side.grad, acc, batch * n);
    side.weight = at::empty({batch, positions_of(features[l])}, at::TensorOptions().dtype(acc));
    sides.push_back(std::move(side));
  }
  return sides;
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> attention_maps_backward_cpu(  //
    at::TensorList grad_maps,                                                              // L x (B, N)
    at::TensorList grad_map_tangents,                                                      // the same, or empty
    at::TensorList features,                                                               // L x (B, C, *spatial)
    at::TensorList tangents,                                                               // the same, or empty
    double power, at::IntArrayRef sizes,
    at::TensorList maps,         // L x (B, N) and, with tangents, behind them those of the maps
    const at::Tensor& totals) {  // (samples of all layers, 1, or 2 with tangents)
  const Input input = read_input(kBackward, features, tangents, power, sizes);
  const bool has_tangents = !tangents.empty();
  const int64_t layers = static_cast<int64_t>(features.size()), columns = has_tangents ? 2 : 1;
  checks::map_gradients(kBackward, features, grad_maps, tangents, grad_map_tangents);
  checks::same_layers(kBackward, "features and tangents", columns * layers, "maps", static_cast<int64_t>(maps.size()));
  const std::vector<int64_t> first = first_rows(features);
  checks::weights(kBackward, 0, "totals", totals, at::kDouble, first.back() * columns);
  const auto of = map_gradients(input, features, maps.slice(0, layers), grad_maps, "map", "map gradient");
  std::vector<MapGradient> of_tangents;
  if (has_tangents)
    of_tangents =
        map_gradients(input, features, maps.slice(layers), grad_map_tangents, "map tangent", "map tangent gradient");

  // Every thread takes the same share of each layer, whose samples cost unlike much.
  const double* const rows = totals.const_data_ptr<double>();
  int64_t positions = 0, shares = 1;
  for (int64_t l = 0; l < layers; ++l) {
    positions += positions_of(features[l]);
    shares = std::max(shares, features[l].size(0));
  }
  at::parallel_for(0, shares, 1 + (1 << 15) / positions, [&](int64_t begin, int64_t end) {
    for (int64_t l = 0; l < layers; ++l) {
      const int64_t batch = features[l].size(0), last = end * batch / shares;
      with_accumulation(of[l].weight.scalar_type(), [&](auto acc) {
        for (int64_t sample = begin * batch / shares; sample < last; ++sample)
          write_weights<decltype(acc)>(input.layers[l], sample, of[l], has_tangents ? &of_tangents[l] : nullptr,
                                       rows + (first[l] + sample) * columns);
      });
    }
  });

  Gradients<FeatureGradient> gradients, tangent_gradients;
  std::vector<GradientTarget> targets;
  for (int64_t l = 0; l < layers; ++l) {
    GradientTarget target;
    target.source = input.sources[l];
    target.weights = static_cast<const char*>(of[l].weight.const_data_ptr());
    target.grad = gradients.add(features[l], target.source.feature).view;
    if (has_tangents) {
      target.tangent_weights = static_cast<const char*>(of_tangents[l].weight.const_data_ptr());
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
