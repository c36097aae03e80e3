// jacobian_sums, its backward and jacobian_divergence on the CPU. Legend: L layers; a and b are the derivatives of
// student and teacher, of one shape.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <vector>

#include "../checks.h"
#include "../distances.h"
#include "../jacobian_pair.h"
#include "dtypes.h"
#include "huge_pages.h"
#include "jacobian_chunks.h"
#include "work_queue.h"

namespace lwkd {
namespace {

PairChunk chunk_of(const Pair& pair, int64_t begin) {
  const int64_t offset = begin * static_cast<int64_t>(pair.a.element_size());
  return {pair.a.scalar_type(), static_cast<const char*>(pair.a.const_data_ptr()) + offset,
          static_cast<const char*>(pair.b.const_data_ptr()) + offset, std::min(kChunk, pair.a.numel() - begin)};
}

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
  checks::derivatives_call(op, student, teacher);
  Input input;
  for (int64_t l = 0; l < layers; ++l) {
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
    sum_chunk(chunk_of(input.pairs[item.layer], item.begin), chunks[i].data());
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
  std::vector<double> distances;
  for (int64_t l = 0; l < sums.size(0); ++l)
    distances.push_back(jacobian_distance(ratio_of(kind), sums.const_data_ptr<double>() + 4 * l));
  return {as_tensor(distances, input.any_double ? at::kDouble : at::kFloat), sums};
}

at::Tensor jacobian_slopes_cpu(const at::Tensor& sums,  // (L, 4) float64
                               const at::Tensor& grad,  // (L)
                               c10::string_view kind) {
  constexpr const char* kOp = "jacobian_slopes";
  checks::jacobian_kind(kOp, kind);
  const int64_t layers = grad.dim() == 1 ? grad.size(0) : -1;
  checks::sums_gradient(kOp, sums, layers);
  const at::Tensor from = sums.to(at::kDouble).contiguous(), through = grad.to(at::kDouble).contiguous();
  at::Tensor slopes = at::empty({layers, 4}, at::kDouble);
  double* out = slopes.mutable_data_ptr<double>();
  for (int64_t l = 0; l < layers; ++l) {
    jacobian_slopes(ratio_of(kind), from.const_data_ptr<double>() + 4 * l, out + 4 * l);
    for (int64_t k = 0; k < 4; ++k) out[4 * l + k] *= through.const_data_ptr<double>()[l];
  }
  return slopes;
}

char* at_element(const at::Tensor& written, int64_t begin) {
  return static_cast<char*>(written.mutable_data_ptr()) + begin * static_cast<int64_t>(written.element_size());
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> jacobian_sums_backward_cpu(  //
    const at::Tensor& grad,                                                               // (L, 4)
    at::TensorList a,                                                                     // L x any shape
    at::TensorList b,                                                                     // L x the same shapes
    bool wants_b) {
  constexpr const char* kOp = "jacobian_sums_backward";
  const Input input = read_input(kOp, a, b);
  const int64_t layers = static_cast<int64_t>(input.pairs.size());
  checks::sums_gradient(kOp, grad, layers);
  const at::Tensor grads = grad.to(at::kDouble).contiguous();
  Gradients<PairGradient> of_a, of_b;
  for (int64_t l = 0; l < layers; ++l) {
    prefer_huge_pages(of_a.add(a[l], input.pairs[l].a).written);
    if (wants_b) prefer_huge_pages(of_b.add(b[l], input.pairs[l].b).written);
  }
  run_items(static_cast<int64_t>(input.items.size()), 2 * input.bytes, [&](int64_t i) {
    const auto [l, begin] = input.items[i];
    scale_chunk(chunk_of(input.pairs[l], begin), grads.const_data_ptr<double>() + 4 * l,
                at_element(of_a.written[l], begin), wants_b ? at_element(of_b.written[l], begin) : nullptr);
  });
  return {of_a.finish(), of_b.finish()};
}

}  // namespace

TORCH_LIBRARY_IMPL(lwkd, CPU, m) {
  m.impl("jacobian_sums", jacobian_sums_cpu);
  m.impl("jacobian_sums_backward", jacobian_sums_backward_cpu);
  m.impl("jacobian_divergence", jacobian_divergence_cpu);
  m.impl("jacobian_slopes", jacobian_slopes_cpu);
}

}  // namespace lwkd
