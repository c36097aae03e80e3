// rademacher and hutchinson_trace on CUDA; kernels in kernels/hutchinson.py. Legend: L layers, v the probe.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "../memory_layout.h"
#include "chunks.h"

namespace lwkd::cuda {
namespace {

constexpr int64_t kPlane = 512;          // elements in one bit plane
constexpr int64_t kPlanes = 128;         // bits that one call of Philox gives
constexpr int64_t kWidthBytes = 512;     // of one plane that a program reads: 16 for each thread of its one warp
constexpr int64_t kStepElements = 2048;  // that a program reads at a time
constexpr int64_t kLayerBlock = 1024;    // partials of a layer that are added at once

// Columns of a program, and the planes it reads at a time, which come from one word and so must divide 32. Narrow loads
// need more registers, hence half as many planes.
int64_t columns_of(at::ScalarType dtype) { return kWidthBytes / static_cast<int64_t>(c10::elementSize(dtype)); }

int64_t step_of(at::ScalarType dtype, bool aligned) { return kStepElements / columns_of(dtype) / (aligned ? 1 : 2); }

// A tile has one program for each block of columns of its planes; a last tile of less than a plane has fewer.
int64_t chunks_of(int64_t elements, int64_t columns) {
  const int64_t tile = kPlanes * kPlane, rest = std::min(elements % tile, kPlane);
  return elements / tile * (kPlane / columns) + ceil_div(rest, columns);
}

struct HutchinsonPlan : ChunkPlan {
  explicit HutchinsonPlan(const Cut& cut) : ChunkPlan(cut, /*operands=*/1) {}
};

Plans<HutchinsonPlan>::Lease plan_for(const Place& place, const std::vector<at::Tensor>& tensors,
                                      std::vector<int64_t> layer_of, int64_t layers) {
  Cut cut;
  Plans<HutchinsonPlan>::Key key = layer_of;
  key.push_back(layers);
  for (const at::Tensor& t : tensors) {
    cut.dtypes.push_back(t.scalar_type());
    cut.elements.push_back(t.numel());
    cut.chunks.push_back(chunks_of(t.numel(), columns_of(t.scalar_type())));
    key.insert(key.end(), {static_cast<int64_t>(t.scalar_type()), t.numel()});
  }
  cut.layer_of = std::move(layer_of);
  cut.layers = layers;
  return plans<HutchinsonPlan>().take(place, std::move(key), [&] { return std::make_unique<HutchinsonPlan>(cut); });
}

Variant& add_constants(Variant& variant, at::ScalarType dtype, bool aligned) {
  return variant.set("COLUMNS", columns_of(dtype)).set("STEP", step_of(dtype, aligned));
}

std::vector<at::Tensor> rademacher_cuda(at::TensorList like,  // any shapes
                                        int64_t seed) {
  std::vector<at::Tensor> probes;
  std::vector<int64_t> own_layer;
  for (size_t i = 0; i < like.size(); ++i) {
    const checks::AtTensor where = checks::at_tensor("rademacher", "tensor", i);
    checks::floating(where, like[i]);
    checks::on_gpu(where, like[i], like[0].device());
    probes.push_back(empty_contiguous(like[i]));
    own_layer.push_back(static_cast<int64_t>(i));
  }
  if (probes.empty()) return probes;
  const Place place(probes[0]);
  auto plan = plan_for(place, probes, std::move(own_layer), static_cast<int64_t>(probes.size()));
  plan->launch(place, {&probes}, [&](const ChunkGroup& group, Arguments arguments, bool) {
    arguments.seed(seed).count(group.rows());
    Variant variant("hutchinson_rademacher_fwd");
    variant.set("ELEMENT", element_of(group.dtype));
    launch(place, add_constants(variant, group.dtype, /*aligned=*/true).warps(1), group.programs, arguments);
  });
  return probes;
}

at::Tensor hutchinson_trace_cuda(at::TensorList products,   // any shapes
                                 at::IntArrayRef layer_of,  // (products,)
                                 int64_t seed, int64_t layers) {
  checks::layer_indices(static_cast<int64_t>(products.size()), layer_of, layers);
  std::vector<at::Tensor> contiguous;  // the signs follow the row-major order
  for (size_t i = 0; i < products.size(); ++i) {
    const checks::AtTensor where = checks::at_tensor("hutchinson_trace", "product", i);
    checks::floating(where, products[i]);
    checks::on_gpu(where, products[i], products[0].device());
    contiguous.push_back(products[i].contiguous());
  }
  const Place place(contiguous[0]);
  auto plan = plan_for(place, contiguous, layer_of.vec(), layers);
  const auto options = at::TensorOptions().dtype(at::kFloat).device(place.device());
  const at::Tensor partials = at::empty({plan->partials}, options);
  plan->launch(place, {&contiguous}, [&](const ChunkGroup& group, Arguments arguments, bool aligned) {
    arguments.pointer(partials).seed(seed).count(group.rows());
    Variant variant("hutchinson_trace_fwd");
    variant.set("ELEMENT", element_of(group.dtype)).set("ALIGNED", aligned);
    launch(place, add_constants(variant, group.dtype, aligned).warps(1), group.programs, arguments);
  });
  at::Tensor traces = at::empty({layers}, options);
  Arguments arguments;
  arguments.pointer(partials).pointer(plan->table.fixed(plan->layers)).pointer(traces);
  launch(place, Variant("hutchinson_layers_fwd").set("BLOCK", kLayerBlock).warps(4), layers, arguments);
  return traces;
}

}  // namespace

TORCH_LIBRARY_IMPL(lwkd, CUDA, m) {
  m.impl("rademacher", rademacher_cuda);
  m.impl("hutchinson_trace", hutchinson_trace_cuda);
}

}  // namespace lwkd::cuda
