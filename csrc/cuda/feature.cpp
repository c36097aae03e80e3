#include "feature.h"

namespace lwkd::cuda {
namespace {

enum class Order { channels_first, channels_last, other };

bool follows(const at::Tensor& feature, int64_t dimension, int64_t& expected) {
  const int64_t size = feature.size(dimension);
  if (size != 1 && feature.stride(dimension) != expected) return false;
  expected *= size;
  return true;
}

// Whether one sample lies in memory without gaps: positions adjacent, or channels.
bool dense(const at::Tensor& feature, Order order) {
  int64_t expected = 1;
  if (order == Order::channels_last && !follows(feature, 1, expected)) return false;
  for (int64_t d = feature.dim() - 1; d >= 2; --d)
    if (!follows(feature, d, expected)) return false;
  return order == Order::channels_last || follows(feature, 1, expected);
}

Order order_of(const at::Tensor& feature) {
  const bool first = dense(feature, Order::channels_first);
  const bool last = dense(feature, Order::channels_last);
  const bool one_position = feature.size(1) == feature.numel() / feature.size(0);
  if (last && (one_position || !first)) return Order::channels_last;
  return first ? Order::channels_first : Order::other;
}

Geometry geometry_of(const at::Tensor& feature, Order order) {
  Geometry g;
  g.samples = feature.size(0);
  g.channels = feature.size(1);
  g.size = padded(feature.sizes().slice(2));
  g.positions = positions_of(g.size);
  g.dtype = feature.scalar_type();
  g.channels_last = order == Order::channels_last;
  g.sample_stride = g.samples > 1 ? feature.stride(0) : g.channels * g.positions;
  return g;
}

}  // namespace

int64_t Geometry::fold() const {
  int64_t fold = 1;
  if (channels_last) return fold;
  while (channels % (2 * fold) == 0 && fold < kMostPartials &&
         (fold * positions < kTileColumns || fold * positions % vector() != 0))
    fold *= 2;
  return fold;
}

void Geometry::add_to(std::vector<int64_t>& key) const {
  key.insert(key.end(), {samples, channels, size[0], size[1], size[2], static_cast<int64_t>(dtype),
                         static_cast<int64_t>(channels_last), sample_stride});
}

void Features::add(const at::Tensor& feature) {
  Order order = order_of(feature);
  if (order == Order::other) {
    tensors.push_back(feature.contiguous(at::MemoryFormat::Contiguous));
    order = order_of(tensors.back());
  } else {
    tensors.push_back(feature);
  }
  geometries.push_back(geometry_of(tensors.back(), order));
}

void add_matched(const at::Tensor& feature, const at::Tensor& tangent, Features& features, Features& tangents) {
  const bool equal = feature.strides() == tangent.strides() && feature.scalar_type() == tangent.scalar_type();
  features.add(equal ? feature : feature.contiguous(at::MemoryFormat::Contiguous));
  tangents.add(equal ? tangent : tangent.to(feature.scalar_type()).contiguous(at::MemoryFormat::Contiguous));
}

FeatureGradient::FeatureGradient(const at::Tensor& of, const Geometry& read) : WrittenGradient(of) {
  const Order order = read.channels_last ? Order::channels_last : Order::channels_first;
  const bool whole = result.size(0) == 1 || result.stride(0) == read.channels * read.positions;
  if (result.scalar_type() != read.dtype || !whole || !dense(result, order))
    written = empty_in_layout(of, read.dtype, read.channels_last);
}

}  // namespace lwkd::cuda
