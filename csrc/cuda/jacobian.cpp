// jacobian_sums, its backward and jacobian_divergence on CUDA; kernels in kernels/jacobian.py.
// Legend: L layers; a and b are the derivatives of student and teacher, of one shape.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "../jacobian_pair.h"
#include "chunks.h"

namespace lwkd::cuda {
namespace {

constexpr int64_t kChunk = 8192;  // elements of each tensor that one program reads
constexpr int64_t kStep = 1024;   // that it reads at a time: eight a thread, so that registers suffice for four sums
constexpr int64_t kLayerBlock = 256;  // partials of a layer that are added at once
constexpr int64_t kWarps = 4;

struct Input {
  std::vector<at::Tensor> a, b;  // as they are walked: any dense memory order that both of a pair share

  Cut cut() const {
    Cut cut;
    cut.layers = static_cast<int64_t>(a.size());
    for (int64_t l = 0; l < cut.layers; ++l) {
      cut.dtypes.push_back(a[l].scalar_type());
      cut.elements.push_back(a[l].numel());
      cut.chunks.push_back(ceil_div(a[l].numel(), kChunk));
      cut.layer_of.push_back(l);
    }
    return cut;
  }
};

Input checked_input(const char* op, at::TensorList student, at::TensorList teacher) {
  const int64_t layers = static_cast<int64_t>(student.size());
  checks::derivatives_call(op, student, teacher);
  Input input;
  for (int64_t l = 0; l < layers; ++l) {
    checks::on_gpu(checks::at_layer(op, l, "student"), student[l], student[0].device());
    checks::on_gpu(checks::at_layer(op, l, "teacher"), teacher[l], student[0].device());
    const Pair pair(student[l], teacher[l]);
    input.a.push_back(pair.a);
    input.b.push_back(pair.b);
  }
  return input;
}

struct JacobianPlan : ChunkPlan {
  using ChunkPlan::ChunkPlan;
};

Plans<JacobianPlan>::Lease plan_for(const Place& place, const Input& input, int64_t operands) {
  const Cut cut = input.cut();
  Plans<JacobianPlan>::Key key = {operands};
  for (const at::ScalarType dtype : cut.dtypes) key.push_back(static_cast<int64_t>(dtype));
  key.insert(key.end(), cut.elements.begin(), cut.elements.end());
  return plans<JacobianPlan>().take(place, std::move(key),
                                    [&] { return std::make_unique<JacobianPlan>(cut, operands); });
}

void launch_chunks(const Place& place, const char* kernel, JacobianPlan& plan, const Operands& operands,
                   const at::Tensor& buffer) {
  plan.launch(place, operands, [&](const ChunkGroup& group, Arguments arguments, bool aligned) {
    arguments.pointer(buffer).count(group.rows());
    Variant variant(kernel);
    variant.set("ELEMENT", element_of(group.dtype)).set("ALIGNED", aligned).set("CHUNK", kChunk).set("STEP", kStep);
    launch(place, variant.warps(kWarps), group.programs, arguments);
  });
}

// Sums (L, 4): float32, or float64 beside distances (L), whose backward forms differences of them.
std::pair<at::Tensor, at::Tensor> sums_of(const Input& input, const char* kind) {
  const Place place(input.a[0]);
  auto plan = plan_for(place, input, 2);
  const auto options = at::TensorOptions().device(place.device());
  const int64_t layers = static_cast<int64_t>(input.a.size());
  const at::Tensor partials = at::empty({plan->partials, 4}, options.dtype(at::kFloat));
  launch_chunks(place, "jacobian_sums_fwd", *plan, {&input.a, &input.b}, partials);
  const bool distances_too = kind != nullptr;
  at::Tensor sums = at::empty({layers, 4}, options.dtype(distances_too ? at::kDouble : at::kFloat));
  at::Tensor distances;
  Arguments arguments;
  arguments.pointer(partials).pointer(plan->table.fixed(plan->layers)).pointer(sums);
  if (distances_too) {
    distances = at::empty({layers}, options.dtype(at::kFloat));
    arguments.pointer(distances);
  }
  Variant variant("jacobian_layers_fwd");
  variant.pointer("distances_ptr", distances_too).set("SUMS", element_of(sums.scalar_type()));
  variant.set("KIND", distances_too ? kind : "none").set("BLOCK", kLayerBlock);
  launch(place, variant.warps(kWarps), layers, arguments);
  return {sums, distances};
}

at::Tensor jacobian_sums_cuda(at::TensorList a,    // L x any shape
                              at::TensorList b) {  // L x the same shapes
  return sums_of(checked_input("jacobian_sums", a, b), nullptr).first;
}

std::tuple<at::Tensor, at::Tensor> jacobian_divergence_cuda(  //
    at::TensorList student,                                   // L x any shape
    at::TensorList teacher,                                   // L x the same shapes
    c10::string_view kind) {
  constexpr const char* kOp = "jacobian_divergence";
  checks::jacobian_kind(kOp, kind);
  const auto [sums, distances] = sums_of(checked_input(kOp, student, teacher), std::string(kind).c_str());
  return {distances, sums};
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> jacobian_sums_backward_cuda(  //
    const at::Tensor& grad,                                                                // (L, 4)
    at::TensorList a,                                                                      // L x any shape
    at::TensorList b,                                                                      // L x the same shapes
    bool wants_b) {  // the kernel writes both; what is not asked for is dropped
  constexpr const char* kOp = "jacobian_sums_backward";
  const Input input = checked_input(kOp, a, b);
  const int64_t layers = static_cast<int64_t>(input.a.size());
  checks::sums_gradient(kOp, grad, layers);
  TORCH_CHECK_VALUE(grad.device() == input.a[0].device(), "lwkd.ops.", kOp, ": grad: expected device ",
                    input.a[0].device(), " like the derivatives, found ", grad.device(), ". Move it there.");
  Gradients<PairGradient> of_a, of_b;
  for (int64_t l = 0; l < layers; ++l) {
    of_a.add(a[l], input.a[l]);
    of_b.add(b[l], input.b[l]);
  }
  const Place place(input.a[0]);
  const at::Tensor grads = grad.to(at::kFloat).contiguous();
  auto plan = plan_for(place, input, 4);
  launch_chunks(place, "jacobian_sums_bwd", *plan, {&input.a, &input.b, &of_a.written, &of_b.written}, grads);
  return {of_a.finish(), wants_b ? of_b.finish() : std::vector<at::Tensor>()};
}

}  // namespace

TORCH_LIBRARY_IMPL(lwkd, CUDA, m) {
  m.impl("jacobian_sums", jacobian_sums_cuda);
  m.impl("jacobian_sums_backward", jacobian_sums_backward_cuda);
  m.impl("jacobian_divergence", jacobian_divergence_cuda);
}

}  // namespace lwkd::cuda
