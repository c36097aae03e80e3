// sgd_step and adamw_step on CUDA, one launch for all parameters of a dtype; kernels in kernels/step.py.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "../step_checks.h"
#include "chunks.h"

namespace lwkd::cuda {
namespace {

constexpr int64_t kChunk = 8192;  // elements of each tensor that one program updates
constexpr int64_t kStep = 1024;   // elements it updates at a time: eight a thread
constexpr int64_t kWarps = 4;

using Tensors = std::vector<at::Tensor>;

struct StepPlan {
  std::vector<ChunkGroup> groups;
  std::vector<int64_t> counters;  // the section of each group's
  LayerTable table;

  StepPlan(const Tensors& parameters, at::IntArrayRef layer_of, int64_t operands) {
    Sections sections;
    std::vector<at::ScalarType> dtypes;
    for (const at::Tensor& p : parameters) dtypes.push_back(p.scalar_type());
    groups = group_by_dtype(dtypes, operands, sections, [&](int64_t i, std::vector<int64_t>& rows) {
      const int64_t elements = parameters[i].numel();
      rows.insert(rows.end(), {elements, layer_of[i]});
      // One program at least: an empty parameter has a step to count as well.
      return std::max<int64_t>(ceil_div(elements, kChunk), 1);
    });
    for (const ChunkGroup& group : groups)
      counters.push_back(sections.add(std::vector<int64_t>(ceil_div(group.rows(), 2))));  // int32
    table = LayerTable(sections);
  }
};

// What both ops are given for all parameters.
struct Common {
  const char* op;
  at::TensorList parameters, gradients;
  const at::Tensor& multipliers;
  at::IntArrayRef layer_of;
  double lr;
  const std::optional<at::Tensor>&lr_tensor, &grad_scale, &found_inf;
};

void check(const Common& given) {
  const size_t count = given.parameters.size();
  const at::Tensor& first = given.parameters[0];
  checks::step_list(given.op, "gradients", given.gradients.size(), count);
  checks::step_list(given.op, "layer_of", given.layer_of.size(), count);
  for (size_t i = 0; i < count; ++i) {
    checks::stepped_parameter(given.op, i, given.parameters[i], first);
    checks::like_parameter(given.op, "gradient", i, given.gradients[i], given.parameters[i]);
  }
  checks::step_rates(given.op, given.multipliers, given.layer_of, first);
  checks::optional_number(given.op, "lr", given.lr_tensor, first);
  checks::optional_number(given.op, "grad_scale", given.grad_scale, first);
  checks::optional_number(given.op, "found_inf", given.found_inf, first);
}

void check_states(const Common& given, const char* list, at::TensorList states) {
  checks::step_list(given.op, list, states.size(), given.parameters.size());
  for (size_t i = 0; i < states.size(); ++i) checks::step_state(given.op, list, i, states[i], given.parameters[i]);
}

// Tells autograd that these were written in place.
void bump_versions(const Tensors& tensors) {
  for (const at::Tensor& t : tensors)
    if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

// The gradients as they are walked: one that does not lie as its parameter does is copied.
struct WalkedGradients {
  Tensors walked;
  std::vector<size_t> copied;

  explicit WalkedGradients(const Common& given) : walked(given.gradients.vec()) {
    for (size_t i = 0; i < walked.size(); ++i) {
      if (same_strides(walked[i], given.parameters[i])) continue;
      walked[i] = in_layout_of(given.parameters[i], walked[i]);
      copied.push_back(i);
    }
  }

  // With a gradient scale the kernel writes unscaled gradients, which must reach the caller's tensors.
  void finish(const Common& given) const {
    if (!given.grad_scale.has_value()) return;
    for (const size_t i : copied) given.gradients[i].copy_(walked[i]);
    bump_versions(given.gradients.vec());
  }
};

const void* address_of(const std::optional<at::Tensor>& t) { return t.has_value() ? t->const_data_ptr() : nullptr; }

// One launch a dtype. operands: in the order of the kernel, each a list over the parameters. name(dtype): the variant,
// up to the constants that both kernels have; options(arguments) adds the last arguments.
template <class Name, class Options>
void launch_step(const Place& place, const Common& given, const std::vector<Tensors>& operands, const Name& name,
                 bool counters, const Options& options) {
  const int64_t count = static_cast<int64_t>(operands.size());
  Plans<StepPlan>::Key key = {count};
  key.reserve(1 + 3 * given.parameters.size() + 2);
  for (size_t i = 0; i < given.parameters.size(); ++i)
    key.insert(key.end(), {static_cast<int64_t>(given.parameters[i].scalar_type()), given.parameters[i].numel(),
                           given.layer_of[i]});
  auto plan = plans<StepPlan>().take(place, std::move(key),
                                     [&] { return std::make_unique<StepPlan>(operands[0], given.layer_of, count); });
  for (const ChunkGroup& group : plan->groups) {
    int64_t* next = plan->table.addresses().data() + group.addresses;
    for (const int64_t tensor : group.tensors)
      for (const Tensors& operand : operands) *next++ = reinterpret_cast<int64_t>(operand[tensor].mutable_data_ptr());
  }
  plan->table.write(place);
  for (size_t index = 0; index < plan->groups.size(); ++index) {
    const ChunkGroup& group = plan->groups[index];
    Arguments arguments = group.arguments(plan->table);
    if (counters) arguments.pointer(plan->table.fixed(plan->counters[index]));
    arguments.pointer(given.multipliers).pointer(address_of(given.lr_tensor)).pointer(address_of(given.grad_scale));
    arguments.pointer(address_of(given.found_inf)).count(group.rows()).real(given.lr);
    options(arguments);
    Variant variant = name(group.dtype);
    launch(place, variant.set("CHUNK", kChunk).set("STEP", kStep).warps(kWarps), group.programs, arguments);
  }
}

void sgd_step_cuda(at::TensorList parameters,        // any shapes
                   at::TensorList gradients,         // the same shapes
                   at::TensorList momentum_buffers,  // the same shapes; empty where momentum is 0
                   const at::Tensor& multipliers,    // (layers,)
                   at::IntArrayRef layer_of,         // (parameters,)
                   double lr, const std::optional<at::Tensor>& lr_tensor, double momentum, double dampening,
                   double weight_decay, bool nesterov, bool maximize, bool first,
                   const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf) {
  if (parameters.empty()) return;
  const Common given = {"sgd_step", parameters, gradients, multipliers, layer_of, lr, lr_tensor, grad_scale, found_inf};
  check(given);
  const bool buffered = momentum != 0;
  if (buffered) check_states(given, "momentum_buffers", momentum_buffers);
  const Place place(parameters[0]);
  const WalkedGradients descent(given);
  std::vector<Tensors> operands = {parameters.vec(), descent.walked};
  if (buffered) operands.push_back(momentum_buffers.vec());
  const auto name = [&](at::ScalarType dtype) {
    return Variant("step_sgd_fwd").set("ELEMENT", element_of(dtype)).set("MOMENTUM", buffered);
  };
  launch_step(place, given, operands, name, /*counters=*/false, [&](Arguments& arguments) {
    arguments.real(momentum).real(dampening).real(weight_decay).count(nesterov).count(first).count(maximize);
  });
  descent.finish(given);
  bump_versions(operands[0]);
  if (buffered) bump_versions(operands[2]);
}

void adamw_step_cuda(at::TensorList parameters,       // any shapes
                     at::TensorList gradients,        // the same shapes, as the three that follow
                     at::TensorList exp_avgs,         //
                     at::TensorList exp_avg_sqs,      //
                     at::TensorList max_exp_avg_sqs,  // empty without amsgrad
                     at::TensorList steps,            // float32, one element each
                     const at::Tensor& multipliers,   // (layers,)
                     at::IntArrayRef layer_of,        // (parameters,)
                     double lr, const std::optional<at::Tensor>& lr_tensor, double beta1, double beta2, double eps,
                     double weight_decay, bool amsgrad, bool maximize, const std::optional<at::Tensor>& grad_scale,
                     const std::optional<at::Tensor>& found_inf) {
  if (parameters.empty()) return;
  const Common given = {"adamw_step", parameters, gradients,  multipliers, layer_of,
                        lr,           lr_tensor,  grad_scale, found_inf};
  check(given);
  check_states(given, "exp_avgs", exp_avgs);
  check_states(given, "exp_avg_sqs", exp_avg_sqs);
  if (amsgrad) check_states(given, "max_exp_avg_sqs", max_exp_avg_sqs);
  checks::step_list(given.op, "steps", steps.size(), parameters.size());
  for (size_t i = 0; i < steps.size(); ++i) checks::step_count(given.op, i, steps[i], parameters[0]);
  const Place place(parameters[0]);
  const WalkedGradients descent(given);
  std::vector<Tensors> operands = {parameters.vec(), descent.walked, exp_avgs.vec(), exp_avg_sqs.vec()};
  if (amsgrad) operands.push_back(max_exp_avg_sqs.vec());
  operands.push_back(steps.vec());
  const auto name = [&](at::ScalarType dtype) {
    return Variant("step_adamw_fwd").set("ELEMENT", element_of(dtype)).set("AMSGRAD", amsgrad);
  };
  // Of β rounded to float32, as the kernel reads it, so that the corrections fit the averages.
  const auto logarithm = [](double beta) { return std::log(static_cast<double>(static_cast<float>(beta))); };
  launch_step(place, given, operands, name, /*counters=*/true, [&](Arguments& arguments) {
    arguments.real(beta1).real(beta2).real(logarithm(beta1)).real(logarithm(beta2));
    arguments.real(eps).real(weight_decay).count(maximize);
  });
  descent.finish(given);
  for (size_t i = 0; i < operands.size(); ++i)
    if (i != 1) bump_versions(operands[i]);
}

}  // namespace

TORCH_LIBRARY_IMPL(lwkd, CUDA, m) {
  m.impl("sgd_step", sgd_step_cuda);
  m.impl("adamw_step", adamw_step_cuda);
}

}  // namespace lwkd::cuda
