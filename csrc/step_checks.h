// The checks of the optimizer steps. They run over all tensors at every step, so a message is put together only where
// something is wrong.

#pragma once

#include <optional>

#include "checks.h"
#include "memory_layout.h"

namespace lwkd::checks {

inline void step_list(const char* op, const char* list, size_t found, size_t parameters) {
  TORCH_CHECK_VALUE(found == parameters, "lwkd.ops.", op, ": expected one of ", list, " for each of ", parameters,
                    " parameters, found ", found, ". Pass the lists in the same order.");
}

inline void stepped_parameter(const char* op, size_t index, const at::Tensor& t, const at::Tensor& first) {
  const at::ScalarType dtype = t.scalar_type();
  const bool known = dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16;
  if (known && t.device() == first.device() && t.is_non_overlapping_and_dense()) return;
  const AtTensor where = at_tensor(op, "parameter", index);
  floating(where, t);
  on_gpu(where, t, first.device());
  TORCH_CHECK_VALUE(t.is_non_overlapping_and_dense(), where,
                    ": expected memory without gaps or overlaps, found strides ", t.strides(), " for shape ", t.sizes(),
                    ". Make the parameter from a contiguous tensor.");
}

inline void like_parameter(const char* op, const char* list, size_t index, const at::Tensor& t,
                           const at::Tensor& parameter) {
  if (t.scalar_type() == parameter.scalar_type() && t.device() == parameter.device() && t.sizes() == parameter.sizes())
    return;
  const AtTensor where = at_tensor(op, list, index);
  TORCH_CHECK_TYPE(t.scalar_type() == parameter.scalar_type(), where, ": expected the dtype of the parameter, ",
                   parameter.scalar_type(), ", found ", t.scalar_type(), ". Convert it.");
  TORCH_CHECK_VALUE(t.device() == parameter.device(), where, ": expected device ", parameter.device(),
                    " like the parameter, found ", t.device(), ". Move it there.");
  TORCH_CHECK_VALUE(t.sizes() == parameter.sizes(), where, ": expected the shape of the parameter, ", parameter.sizes(),
                    ", found ", t.sizes(), ". Pass the lists in the same order.");
}

// A state of the base optimizer: it is written in place, so its memory order must be that of the parameter.
inline void step_state(const char* op, const char* list, size_t index, const at::Tensor& t,
                       const at::Tensor& parameter) {
  like_parameter(op, list, index, t, parameter);
  TORCH_CHECK_VALUE(same_strides(t, parameter), at_tensor(op, list, index),
                    ": expected the memory order of the parameter, strides ", parameter.strides(), ", found ",
                    t.strides(), ". Replace it by torch.empty_like(parameter).copy_(it).");
}

inline bool is_number(const at::Tensor& t, const at::Tensor& parameter) {
  return t.scalar_type() == at::kFloat && t.numel() == 1 && t.device() == parameter.device();
}

inline void one_number(const char* op, const std::string& name, const at::Tensor& t, const at::Tensor& parameter) {
  TORCH_CHECK_VALUE(is_number(t, parameter), "lwkd.ops.", op, ": ", name, ": expected one float32 on ",
                    parameter.device(), ", found ", t.sizes(), " of ", t.scalar_type(), " on ", t.device(),
                    ". Move and convert it with .to().");
}

inline void optional_number(const char* op, const char* name, const std::optional<at::Tensor>& t,
                            const at::Tensor& parameter) {
  if (t.has_value()) one_number(op, name, *t, parameter);
}

inline void step_count(const char* op, size_t index, const at::Tensor& t, const at::Tensor& parameter) {
  if (!is_number(t, parameter)) one_number(op, "step " + std::to_string(index), t, parameter);
}

inline void step_rates(const char* op, const at::Tensor& multipliers, at::IntArrayRef layer_of,
                       const at::Tensor& parameter) {
  TORCH_CHECK_VALUE(multipliers.scalar_type() == at::kFloat && multipliers.dim() == 1 && multipliers.is_contiguous() &&
                        multipliers.device() == parameter.device(),
                    "lwkd.ops.", op, ": multipliers: expected (layers,) contiguous float32 on ", parameter.device(),
                    ", found ", multipliers.sizes(), " of ", multipliers.scalar_type(), " on ", multipliers.device(),
                    ". Move and convert them with .to().");
  for (size_t i = 0; i < layer_of.size(); ++i)
    TORCH_CHECK_VALUE(layer_of[i] >= -1 && layer_of[i] < multipliers.numel(), "lwkd.ops.", op,
                      ": layer_of of parameter ", i, ": expected -1 for no layer, or 0 to ", multipliers.numel() - 1,
                      " for ", multipliers.numel(), " multipliers, found ", layer_of[i], ".");
}

}  // namespace lwkd::checks
