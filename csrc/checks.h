// The checks of what reaches the ops. A message names the layer, what was expected, what was found, and what to do.

#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <ostream>
#include <string>

namespace lwkd::checks {

// What a message is about, "layer 3: student" or "product 3". Checks run over all tensors of every call, so the words
// are put together only when something is wrong.
struct AtLayer {
  const char* op;
  int64_t layer;
  const char* side;
};

struct AtTensor {
  const char* op;
  const char* what;
  size_t index;
};

inline std::ostream& operator<<(std::ostream& out, const AtLayer& at) {
  return out << "lwkd.ops." << at.op << ": layer " << at.layer << ": " << at.side;
}

inline std::ostream& operator<<(std::ostream& out, const AtTensor& at) {
  return out << "lwkd.ops." << at.op << ": " << at.what << " " << at.index;
}

inline AtLayer at_layer(const char* op, int64_t layer, const char* side) { return {op, layer, side}; }
inline AtTensor at_tensor(const char* op, const char* what, size_t index) { return {op, what, index}; }

inline void one_layer_at_least(const char* op, int64_t layers) {
  TORCH_CHECK_VALUE(layers > 0, "lwkd.ops.", op,
                    ": expected at least one layer, found an empty list. Pass one feature a layer.");
}

inline void same_layers(const char* op, const char* first, int64_t first_layers, const char* second,
                        int64_t second_layers) {
  TORCH_CHECK_VALUE(first_layers == second_layers, "lwkd.ops.", op, ": expected as many ", second, " as ", first,
                    ", found ", first_layers, " ", first, " and ", second_layers, " ", second,
                    ". Pass one of each for every layer.");
}

template <class Where>
void floating(const Where& where, const at::Tensor& t) {
  const at::ScalarType dtype = t.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kDouble, where,
                   ": expected float32, float16, bfloat16 or float64, found ", dtype, ". Convert it with .float().");
  TORCH_CHECK_VALUE(t.layout() == at::kStrided, where, ": expected a dense tensor, found layout ", t.layout(),
                    ". Convert it with .to_dense().");
}

inline void feature(const char* op, const char* side, int64_t layer, const at::Tensor& t) {
  const AtLayer where = at_layer(op, layer, side);
  floating(where, t);
  TORCH_CHECK_VALUE(t.dim() >= 2 && t.dim() <= 5, where,
                    ": expected (B, C, *spatial) with at most three spatial dimensions, found shape ", t.sizes(),
                    ". Reshape it, for example with .flatten(2).");
  TORCH_CHECK_VALUE(t.numel() > 0, where, ": expected at least one element in every dimension, found shape ", t.sizes(),
                    ". Skip empty batches before measuring.");
}

// What the GPU kernels read: their dtypes, and all tensors of a call on one device.
template <class Where>
void on_gpu(const Where& where, const at::Tensor& t, const c10::Device& device) {
  TORCH_CHECK_VALUE(t.device() == device, where, ": expected device ", device, " like the first tensor, found ",
                    t.device(), ". Move all tensors of a call to one device.");
  TORCH_CHECK_TYPE(t.scalar_type() != at::kDouble, where,
                   ": found float64; the GPU kernels read float32, float16 and bfloat16. Convert it with .float(), or "
                   "use lwkd.reference, which computes in float64 on every device.");
}

inline void same_batch_and_rank(const char* op, int64_t layer, const at::Tensor& student, const at::Tensor& teacher) {
  const AtLayer where = at_layer(op, layer, "student and teacher");
  TORCH_CHECK_VALUE(student.size(0) == teacher.size(0), where, ": expected the same batch size, found ",
                    student.size(0), " and ", teacher.size(0), ". Pass features that both nets made from one batch.");
  TORCH_CHECK_VALUE(student.dim() == teacher.dim(), where, ": expected as many spatial dimensions, found shapes ",
                    student.sizes(), " and ", teacher.sizes(),
                    ". View both in the same form, for example both as (B, C, N) with .flatten(2).");
}

inline void same_probabilities(const char* op, int64_t layer, const at::Tensor& student, const at::Tensor& teacher) {
  const AtLayer where = at_layer(op, layer, "student and teacher");
  TORCH_CHECK_VALUE(student.dim() == 4 && teacher.dim() == 4, where,
                    ": expected probabilities (B, heads, N, N), found shapes ", student.sizes(), " and ",
                    teacher.sizes(), ". Use source='features' for feature maps.");
  TORCH_CHECK_VALUE(student.size(2) == teacher.size(2) && student.size(3) == teacher.size(3), where,
                    ": expected the same number of tokens, found ", student.sizes(), " and ", teacher.sizes(),
                    ". Probabilities are not resized: pair layers of equal token counts, or use source='features'.");
}

// All of one layer of attention_divergence.
inline void divergence_layer(const char* op, int64_t layer, const at::Tensor& student, const at::Tensor& teacher,
                             bool probabilities) {
  feature(op, "student", layer, student);
  feature(op, "teacher", layer, teacher);
  same_batch_and_rank(op, layer, student, teacher);
  if (probabilities) same_probabilities(op, layer, student, teacher);
}

inline void same_shape(const char* op, int64_t layer, const char* first, const at::Tensor& expected, const char* second,
                       const at::Tensor& found) {
  TORCH_CHECK_VALUE(expected.sizes() == found.sizes(), at_layer(op, layer, second), ": expected the shape of the ",
                    first, ", ", expected.sizes(), ", found ", found.sizes(), ". Pass tensors of equal shape.");
}

inline void power(const char* op, double power) {
  TORCH_CHECK_VALUE(std::isfinite(power) && power >= 1, "lwkd.ops.", op, ": expected a finite power of at least 1, ",
                    "found ", power, ". Use power=2 for the usual attention map.");
}

inline void source(const char* op, c10::string_view source) {
  TORCH_CHECK_VALUE(source == "features" || source == "probabilities", "lwkd.ops.", op,
                    ": expected source 'features' or 'probabilities', found '", source, "'.");
}

inline void kind(const char* op, c10::string_view kind) {
  TORCH_CHECK_VALUE(kind == "jsd" || kind == "l2", "lwkd.ops.", op, ": expected kind 'jsd' or 'l2', found '", kind,
                    "'.");
}

inline void betas(const char* op, at::ArrayRef<double> betas) {
  TORCH_CHECK_VALUE(betas.size() == 2, "lwkd.ops.", op, ": expected two betas (student, teacher), found ", betas.size(),
                    ".");
  TORCH_CHECK_VALUE(betas[0] > 0 && betas[1] > 0 && std::abs(betas[0] + betas[1] - 1) < 1e-6, "lwkd.ops.", op,
                    ": expected positive betas that sum to 1, found (", betas[0], ", ", betas[1],
                    "). Divide both by their sum.");
}

// The lists and options of attention_divergence and of its backward; the tensors follow layer by layer.
inline void divergence_call(const char* op, at::TensorList student, at::TensorList teacher, c10::string_view source_,
                            c10::string_view kind_, double power_, at::ArrayRef<double> betas_) {
  const int64_t layers = static_cast<int64_t>(student.size());
  one_layer_at_least(op, layers);
  same_layers(op, "student features", layers, "teacher features", static_cast<int64_t>(teacher.size()));
  source(op, source_);
  kind(op, kind_);
  power(op, power_);
  betas(op, betas_);
}

inline void divergence_backward_call(const char* op, const at::Tensor& grad, at::TensorList student,
                                     at::TensorList factors, c10::string_view source_, double power_) {
  const int64_t layers = static_cast<int64_t>(student.size());
  one_layer_at_least(op, layers);
  same_layers(op, "student features", layers, "factors", static_cast<int64_t>(factors.size()));
  same_layers(op, "student features", layers, "gradients", grad.numel());
  source(op, source_);
  power(op, power_);
}

inline void sizes(const char* op, int64_t found, int64_t expected) {
  TORCH_CHECK_VALUE(found == expected, "lwkd.ops.", op, ": expected ", expected,
                    " sizes, one for every spatial dimension of every layer, found ", found,
                    ". Pass one size tuple a layer, of the rank of its feature.");
}

inline void size(const char* op, int64_t layer, at::IntArrayRef size) {
  for (const int64_t length : size)
    TORCH_CHECK_VALUE(length > 0, at_layer(op, layer, "size"), ": expected positive lengths, found ", size, ".");
}

// The lists, options, features and tangents of attention_maps; what sizes holds follows layer by layer.
inline void maps_call(const char* op, at::TensorList features, at::TensorList tangents, double power_,
                      at::IntArrayRef sizes_) {
  const int64_t layers = static_cast<int64_t>(features.size());
  one_layer_at_least(op, layers);
  if (!tangents.empty()) same_layers(op, "features", layers, "tangents", static_cast<int64_t>(tangents.size()));
  power(op, power_);
  int64_t ranks = 0;
  for (int64_t l = 0; l < layers; ++l) {
    feature(op, "feature", l, features[l]);
    ranks += features[l].dim() - 2;
    if (tangents.empty()) continue;
    feature(op, "tangent", l, tangents[l]);
    same_shape(op, l, "feature", features[l], "tangent", tangents[l]);
  }
  sizes(op, static_cast<int64_t>(sizes_.size()), ranks);
}

inline void map_gradients(const char* op, at::TensorList features, at::TensorList grad_maps, at::TensorList tangents,
                          at::TensorList grad_map_tangents) {
  same_layers(op, "features", static_cast<int64_t>(features.size()), "map gradients",
              static_cast<int64_t>(grad_maps.size()));
  same_layers(op, "tangents", static_cast<int64_t>(tangents.size()), "map tangent gradients",
              static_cast<int64_t>(grad_map_tangents.size()));
}

inline void weights(const char* op, int64_t layer, const char* what, const at::Tensor& found, at::ScalarType dtype,
                    int64_t count) {
  TORCH_CHECK_VALUE(found.scalar_type() == dtype && found.numel() == count && found.is_contiguous(),
                    at_layer(op, layer, what), ": expected ", count, " contiguous values of ", dtype, ", found ",
                    found.sizes(), " of ", found.scalar_type(),
                    ". Pass what the forward op returned with save_factors=True.");
}

// The derivatives of all layers, in pairs.
inline void derivatives_call(const char* op, at::TensorList student, at::TensorList teacher) {
  const int64_t layers = static_cast<int64_t>(student.size());
  one_layer_at_least(op, layers);
  same_layers(op, "student derivatives", layers, "teacher derivatives", static_cast<int64_t>(teacher.size()));
  for (int64_t l = 0; l < layers; ++l) {
    floating(at_layer(op, l, "student"), student[l]);
    floating(at_layer(op, l, "teacher"), teacher[l]);
    same_shape(op, l, "student's derivative", student[l], "teacher", teacher[l]);
  }
}

inline void jacobian_kind(const char* op, c10::string_view kind) {
  TORCH_CHECK_VALUE(kind == "direction" || kind == "norm" || kind == "relative", "lwkd.ops.", op,
                    ": expected kind 'direction', 'norm' or 'relative', found '", kind, "'.");
}

inline void sums_gradient(const char* op, const at::Tensor& found, int64_t layers) {
  TORCH_CHECK_VALUE(found.dim() == 2 && found.size(0) == layers && found.size(1) == 4, "lwkd.ops.", op,
                    ": grad: expected shape (", layers, ", 4), found ", found.sizes(),
                    ". Pass the gradient of the sums of these derivatives.");
}

inline void statistics(const at::Tensor& found, c10::string_view divergence, int64_t columns) {
  TORCH_CHECK_TYPE(found.scalar_type() == at::kFloat, "lwkd.ops.update_rates: statistics: expected float32, found ",
                   found.scalar_type(), ". Convert them with .float().");
  TORCH_CHECK_VALUE(
      found.dim() == 2 && found.size(0) > 0 && found.size(1) == columns,
      "lwkd.ops.update_rates: statistics: expected (L, ", columns, ") for divergence '", divergence, "', found ",
      found.sizes(),
      columns == 1 ? ". Use .unsqueeze(1) on divergences (L,)." : ". Pass one row of statistics a layer.");
}

inline void rate_state(const char* name, const at::Tensor& found, at::ScalarType dtype, at::IntArrayRef shape) {
  TORCH_CHECK_TYPE(found.scalar_type() == dtype, "lwkd.ops.update_rates: ", name, ": expected ", dtype, ", found ",
                   found.scalar_type(), ". Start from lwkd.reference.initial_rates.");
  TORCH_CHECK_VALUE(found.sizes() == shape, "lwkd.ops.update_rates: ", name, ": expected shape ", shape, ", found ",
                    found.sizes(), ". Start from lwkd.reference.initial_rates with the same number of layers.");
}

inline void rate_rule(c10::string_view divergence, c10::string_view policy, double gamma, double momentum,
                      at::ArrayRef<double> clamp, double contrast) {
  TORCH_CHECK_VALUE(divergence == "attention" || divergence == "direction" || divergence == "norm" ||
                        divergence == "relative" || divergence == "hessian",
                    "lwkd.ops.update_rates: expected divergence 'attention', 'direction', 'norm', 'relative' or ",
                    "'hessian', found '", divergence, "'.");
  TORCH_CHECK_VALUE(policy == "relative" || policy == "decay" || policy == "local" || policy == "constant",
                    "lwkd.ops.update_rates: expected policy 'relative', 'decay', 'local' or 'constant', found '",
                    policy, "'.");
  TORCH_CHECK_VALUE(std::isfinite(gamma), "lwkd.ops.update_rates: expected a finite gamma, found ", gamma, ".");
  TORCH_CHECK_VALUE(momentum >= 0 && momentum < 1, "lwkd.ops.update_rates: expected a momentum in [0, 1), found ",
                    momentum, ".");
  TORCH_CHECK_VALUE(clamp.size() == 2 && clamp[0] >= 0 && clamp[0] <= clamp[1] && std::isfinite(clamp[1]),
                    "lwkd.ops.update_rates: expected clamp (smallest, largest) with 0 <= smallest <= largest, found (",
                    clamp, ").");
  TORCH_CHECK_VALUE(policy != "local" || clamp[1] >= 1,
                    "lwkd.ops.update_rates: expected a largest multiplier of at least 1 for policy 'local', found ",
                    clamp[1], ".");
  TORCH_CHECK_VALUE(contrast >= 1 && std::isfinite(contrast),
                    "lwkd.ops.update_rates: expected a finite contrast of at least 1, found ", contrast, ".");
}

// All tensors of update_rates, S columns of statistics.
inline void rate_tensors(const at::Tensor& average, const at::Tensor& baseline, const at::Tensor& divergences,
                         const at::Tensor& multipliers, const at::Tensor& counts, const at::Tensor& statistics_LS,
                         c10::string_view divergence, int64_t columns) {
  statistics(statistics_LS, divergence, columns);
  const int64_t layers = statistics_LS.size(0);
  rate_state("average", average, at::kFloat, statistics_LS.sizes());
  rate_state("baseline", baseline, at::kFloat, {layers});
  rate_state("divergences", divergences, at::kFloat, {layers});
  rate_state("multipliers", multipliers, at::kFloat, {layers});
  rate_state("counts", counts, at::kLong, {2});
}

inline void layer_indices(int64_t products, at::IntArrayRef layer_of, int64_t layers) {
  TORCH_CHECK_VALUE(products > 0, "lwkd.ops.hutchinson_trace: expected at least one product, found an empty list. ",
                    "Pass one Hessian-vector product a parameter.");
  TORCH_CHECK_VALUE(static_cast<int64_t>(layer_of.size()) == products,
                    "lwkd.ops.hutchinson_trace: layer_of: expected one layer for each of ", products,
                    " products, found ", layer_of.size(), ". Pass the lists in the same order.");
  TORCH_CHECK_VALUE(layers > 0, "lwkd.ops.hutchinson_trace: layers: expected at least 1, found ", layers, ".");
  for (size_t i = 0; i < layer_of.size(); ++i)
    TORCH_CHECK_VALUE(layer_of[i] >= 0 && layer_of[i] < layers, "lwkd.ops.hutchinson_trace: layer_of of product ", i,
                      ": expected 0 to ", layers - 1, " for ", layers, " layers, found ", layer_of[i], ".");
}

}  // namespace lwkd::checks
