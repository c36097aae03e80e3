// jacobian_sums, its backward and jacobian_divergence on the CPU. Legend: L layers; a and b are the derivatives of
// student and teacher, of one shape.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <vector>

#include "checks.h"
#include "distances.h"
#include "huge_pages.h"
#include "jacobian_chunks.h"
#include "work_queue.h"

namespace lwkd {
namespace {

bool same_strides(const at::Tensor& one, const at::Tensor& other) {
  for (int64_t d = 0; d < one.dim(); ++d)
    if (one.size(d) > 1 && one.stride(d) != other.stride(d)) return false;
  return true;
}

at::Tensor in_layout_of(const at::Tensor& model, const at::Tensor& t) {
  return at::empty_like(model, t.options().memory_format(at::MemoryFormat::Preserve)).copy_(t);
}

// A pair as it is walked: one dtype, dense, the same strides. Each side is the tensor itself where that holds; one
// side is copied into the other's layout or wider dtype, and both only where neither is dense.
struct Pair {
  at::Tensor a, b;

  Pair(const at::Tensor& student, const at::Tensor& teacher) {
    const at::ScalarType dtype = c10::promoteTypes(student.scalar_type(), teacher.scalar_type());
    a = student.to(dtype);
    b = teacher.to(dtype);
    if (!a.is_non_overlapping_and_dense()) a = b.is_non_overlapping_and_dense() ? in_layout_of(b, a) : a.contiguous();
    if (!same_strides(a, b) || !b.is_non_overlapping_and_dense()) b = in_layout_of(a, b);
  }

  PairChunk chunk(int64_t begin) const {
    const int64_t offset = begin * static_cast<int64_t>(a.element_size());
    return {a.scalar_type(), static_cast<const char*>(a.const_data_ptr()) + offset,
            static_cast<const char*>(b.const_data_ptr()) + offset, std::min(kChunk, a.numel() - begin)};
  }
};

struct Item {
  int64_t layer, begin;
};

struct Input {
  std::vector<Pair> pairs;
  std::vector<Item> items;  // over layers, then chunks
  int64_t bytes = 0;
  bool any_double = false;
};

Input read_input(const char* op, at::TensorList student, at::TensorList teacher) {
  const int64_t layers = static_cast<int64_t>(student.size());
  checks::one_layer_at_least(op, layers);
  checks::same_layers(op, "student derivatives", layers, "teacher derivatives", static_cast<int64_t>(teacher.size()));
  Input input;
  for (int64_t l = 0; l < layers; ++l) {
    checks::floating(checks::at_layer(op, l, "student"), student[l]);
    checks::floating(checks::at_layer(op, l, "teacher"), teacher[l]);
    checks::same_shape(op, l, "student's derivative", student[l], "teacher", teacher[l]);
    input.pairs.emplace_back(student[l], teacher[l]);
    const at::Tensor& a = input.pairs.back().a;
    for (int64_t begin = 0; begin < a.numel(); begin += kChunk) input.items.push_back({l, begin});
    input.bytes += 2 * static_cast<int64_t>(a.nbytes());
    input.any_double |= a.scalar_type() == at::kDouble;
  }
  return input;
}

// (L, 4) float64. Chunks are added in their order, so that the number of threads never changes a bit.
at::Tensor sums_of(const Input& input) {
  std::vector<std::array<double, 4>> chunks(input.items.size());
  run_items(static_cast<int64_t>(input.items.size()), input.bytes, [&](int64_t i) {
    const Item& item = input.items[i];
    sum_chunk(input.pairs[item.layer].chunk(item.begin), chunks[i].data());
  });
  at::Tensor sums = at::empty({static_cast<int64_t>(input.pairs.size()), 4}, at::kDouble);
  double* out = sums.mutable_data_ptr<double>();
  std::fill_n(out, sums.numel(), 0.0);
  for (size_t i = 0; i < chunks.size(); ++i)
    for (int64_t k = 0; k < 4; ++k) out[4 * input.items[i].layer + k] += chunks[i][k];
  return sums;
}

at::Tensor jacobian_sums_cpu(at::TensorList a,    // L x any shape
                             at::TensorList b) {  // L x the same shapes
  const Input input = read_input("jacobian_sums", a, b);
  return sums_of(input).to(input.any_double ? at::kDouble : at::kFloat);
}

std::tuple<at::Tensor, at::Tensor> jacobian_divergence_cpu(  //
    at::TensorList student,                                  // L x any shape
    at::TensorList teacher,                                  // L x the same shapes
    c10::string_view kind) {
  constexpr const char* kOp = "jacobian_divergence";
  checks::jacobian_kind(kOp, kind);
  const Input input = read_input(kOp, student, teacher);
  // Not rounded: small distances are differences of sums, and so are their gradients.
  const at::Tensor sums = sums_of(input);
  at::Tensor divergence = at::empty({sums.size(0)}, at::kDouble);
  for (int64_t l = 0; l < sums.size(0); ++l)
    divergence.mutable_data_ptr<double>()[l] = jacobian_distance(ratio_of(kind), sums.const_data_ptr<double>() + 4 * l);
  return {divergence.to(input.any_double ? at::kDouble : at::kFloat), sums};
}

// A gradient in the dtype and layout of what it is the gradient of, written straight into place where the pair is
// walked in that form.
struct PairGradient {
  at::Tensor result, written;

  PairGradient(const at::Tensor& of, const at::Tensor& walked) : result(at::empty_like(of)), written(result) {
    if (result.scalar_type() != walked.scalar_type() || !same_strides(result, walked)) written = at::empty_like(walked);
    prefer_huge_pages(written);
  }

  char* at_element(int64_t begin) const {
    return static_cast<char*>(written.mutable_data_ptr()) + begin * static_cast<int64_t>(written.element_size());
  }

  at::Tensor finish() const { return written.is_same(result) ? result : result.copy_(written); }
};

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> jacobian_sums_backward_cpu(  //
    const at::Tensor& grad,                                                               // (L, 4)
    at::TensorList a,                                                                     // L x any shape
    at::TensorList b) {                                                                   // L x the same shapes
  constexpr const char* kOp = "jacobian_sums_backward";
  const Input input = read_input(kOp, a, b);
  const int64_t layers = static_cast<int64_t>(input.pairs.size());
  checks::sums_gradient(kOp, grad, layers);
  const at::Tensor grads = grad.to(at::kDouble).contiguous();
  std::vector<PairGradient> of_a, of_b;
  for (int64_t l = 0; l < layers; ++l) {
    of_a.emplace_back(a[l], input.pairs[l].a);
    of_b.emplace_back(b[l], input.pairs[l].b);
  }
  run_items(static_cast<int64_t>(input.items.size()), 2 * input.bytes, [&](int64_t i) {
    const auto [l, begin] = input.items[i];
    scale_chunk(input.pairs[l].chunk(begin), grads.const_data_ptr<double>() + 4 * l, of_a[l].at_element(begin),
                of_b[l].at_element(begin));
  });
  std::vector<at::Tensor> grads_a, grads_b;
  for (const PairGradient& gradient : of_a) grads_a.push_back(gradient.finish());
  for (const PairGradient& gradient : of_b) grads_b.push_back(gradient.finish());
  return {grads_a, grads_b};
}

}  // namespace

TORCH_LIBRARY_IMPL(lwkd, CPU, m) {
  m.impl("jacobian_sums", jacobian_sums_cpu);
  m.impl("jacobian_sums_backward", jacobian_sums_backward_cpu);
  m.impl("jacobian_divergence", jacobian_divergence_cpu);
}

}  // namespace lwkd
