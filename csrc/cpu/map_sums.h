// Unnormalised maps of all layers, and gradients of all features, each in one parallel walk over all features.

#pragma once

#include <functional>
#include <vector>

#include "attention_tiles.h"

namespace lwkd {

// A feature whose map is wanted. With a tangent the map tangent is formed in the same walk.
struct MapSource {
  FeatureView feature;
  FeatureView tangent;
  bool has_tangent = false;
};

// For each source of a layer the map of one sample and, N further on, its tangent, in the accumulation dtype of the
// feature. May be written to.
using SampleMaps = std::vector<void*>;

// Sums the maps of sources[layer * per_layer ...] and, as soon as a sample of a layer is complete, calls
// finish(layer, sample, its per_layer maps) on the thread that completed it, while the maps are still in its cache.
void sum_maps(const std::vector<MapSource>& sources, int64_t per_layer, double power,
              const std::function<void(int64_t, int64_t, const SampleMaps&)>& finish);

// Feature and weights of one layer's gradient; weights are (B, N) in the accumulation dtype.
struct GradientTarget {
  MapSource source;
  FeatureView grad, grad_tangent;
  const char *weights = nullptr, *tangent_weights = nullptr;
  double scale = 1;  // of both weights
};

// Gradients of all layers in one parallel walk: each feature is read once and each gradient written once.
void scale_features(const std::vector<GradientTarget>& targets, double power);

}  // namespace lwkd
