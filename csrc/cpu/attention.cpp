// attention_divergence on the CPU, forward and backward. Legend: L layers, B batch, C channels, N positions.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <numeric>

#include "../checks.h"
#include "area_average.h"
#include "map_divergence.h"
#include "map_sums.h"

namespace lwkd {
namespace {

struct Layer {
  Size3 student_size, teacher_size, common_size;
  int64_t batch, rows;                  // rows: distributions a sample (1, or query positions)
  double student_heads, teacher_heads;  // by which the mean over heads divides; 1 for features
  char* factor = nullptr;
  at::Tensor keep_student, keep_teacher;
};

// Probabilities (B, heads, N, N) are read as a feature with heads for channels and N*N positions.
Layer layer_of(const at::Tensor& student, const at::Tensor& teacher, bool probabilities) {
  Layer layer;
  layer.batch = student.size(0);
  if (probabilities) {
    layer.student_size = layer.teacher_size = layer.common_size = {1, 1, positions_of(student)};
    layer.rows = student.size(2);
    layer.student_heads = static_cast<double>(student.size(1));
    layer.teacher_heads = static_cast<double>(teacher.size(1));
    return layer;
  }
  layer.student_size = padded(student.sizes().slice(2));
  layer.teacher_size = padded(teacher.sizes().slice(2));
  layer.common_size = smaller_of(layer.student_size, layer.teacher_size);
  layer.rows = 1;
  layer.student_heads = layer.teacher_heads = 1;
  return layer;
}

// The map at the common size: the sum itself where no resizing is needed, else its area average in room.
template <class Acc>
Acc* at_common_size(void* sum, const Size3& size, double heads, const Size3& common, std::vector<Acc>& room) {
  Acc* map = static_cast<Acc*>(sum);
  if (heads != 1)
    for (int64_t n = 0; n < positions_of(size); ++n) map[n] /= Acc(heads);
  if (size == common) return map;
  room.resize(positions_of(common));
  area_average(map, size, room.data(), common);
  return room.data();
}

template <class Acc>
double finish_sample(const Layer& layer, int64_t sample, const SampleMaps& sums, const Divergence& how) {
  const int64_t common = positions_of(layer.common_size), n = common / layer.rows;
  std::vector<Acc> student_room, teacher_room, slope_room, totals(2 * layer.rows);
  Acc* student = at_common_size(sums[0], layer.student_size, layer.student_heads, layer.common_size, student_room);
  Acc* teacher = at_common_size(sums[1], layer.teacher_size, layer.teacher_heads, layer.common_size, teacher_room);
  normalise_rows(student, layer.rows, n, totals.data());
  normalise_rows(teacher, layer.rows, n, totals.data() + layer.rows);
  if (layer.factor == nullptr)
    return distance_of_rows(how, student, teacher, layer.rows, n, static_cast<Acc*>(nullptr));

  const int64_t own = positions_of(layer.student_size);
  Acc* factor = reinterpret_cast<Acc*>(layer.factor) + sample * own;
  const bool resized = layer.student_size != layer.common_size;
  if (resized) slope_room.resize(common);
  Acc* slopes = resized ? slope_room.data() : factor;
  const double distance = distance_of_rows(how, student, teacher, layer.rows, n, slopes);
  const Acc scale = Acc(1 / (static_cast<double>(layer.batch) * layer.rows * layer.student_heads));
  for (int64_t row = 0; row < layer.rows; ++row)
    through_normalising(slopes + row * n, student + row * n, n, totals[row], scale);
  if (resized) area_average_transposed(slopes, layer.common_size, factor, layer.student_size);
  return distance;
}

constexpr const char* kOp = "attention_divergence";

std::tuple<at::Tensor, std::vector<at::Tensor>> attention_divergence_cpu(  //
    at::TensorList student,                                                // L x (B, C, *spatial)
    at::TensorList teacher,                                                // L x (B, C', *spatial')
    c10::string_view source, double power, c10::string_view kind,
    at::ArrayRef<double> betas,  // (student, teacher)
    bool save_factors) {
  const int64_t layers = static_cast<int64_t>(student.size());
  checks::divergence_call(kOp, student, teacher, source, kind, power, betas);
  const bool probabilities = source == "probabilities";
  const Divergence how = {kind == "jsd" ? DivergenceKind::jsd : DivergenceKind::l2, betas[0], betas[1]};

  std::vector<Layer> plan;
  std::vector<MapSource> sources;
  std::vector<at::Tensor> factors;
  std::vector<int64_t> first_sample = {0};
  bool any_double = false;
  for (int64_t l = 0; l < layers; ++l) {
    checks::divergence_layer(kOp, l, student[l], teacher[l], probabilities);
    const at::ScalarType acc = accumulation(c10::promoteTypes(student[l].scalar_type(), teacher[l].scalar_type()));
    any_double |= acc == at::kDouble;
    Layer layer = layer_of(student[l], teacher[l], probabilities);
    sources.push_back({readable(student[l], acc, layer.keep_student), {}});
    sources.push_back({readable(teacher[l], acc, layer.keep_teacher), {}});
    if (save_factors) {
      std::vector<int64_t> shape = {layer.batch, positions_of(layer.student_size)};
      if (probabilities) shape = {layer.batch, student[l].size(2), student[l].size(3)};
      factors.push_back(at::empty(shape, acc));
      layer.factor = static_cast<char*>(factors.back().mutable_data_ptr());
    }
    first_sample.push_back(first_sample.back() + layer.batch);
    plan.push_back(std::move(layer));
  }

  std::vector<double> distances(first_sample.back());
  sum_maps(sources, 2, probabilities ? kIdentityPower : power, [&](int64_t l, int64_t sample, const SampleMaps& sums) {
    distances[first_sample[l] + sample] = with_accumulation(sources[2 * l].feature.dtype, [&](auto acc) {
      return finish_sample<decltype(acc)>(plan[l], sample, sums, how);
    });
  });

  std::vector<double> means;
  for (int64_t l = 0; l < layers; ++l) {
    const auto begin = distances.begin() + first_sample[l], end = distances.begin() + first_sample[l + 1];
    means.push_back(std::accumulate(begin, end, 0.0) / (static_cast<double>(plan[l].batch) * plan[l].rows));
  }
  return {as_tensor(means, any_double ? at::kDouble : at::kFloat), factors};
}

constexpr const char* kBackward = "attention_divergence_backward";

std::vector<at::Tensor> attention_divergence_backward_cpu(  //
    const at::Tensor& grad,                                 // (L,)
    at::TensorList student,                                 // L x (B, C, *spatial)
    at::TensorList factors,                                 // L x (B, N), or (B, N, N)
    c10::string_view source, double power) {
  const int64_t layers = static_cast<int64_t>(student.size());
  checks::divergence_backward_call(kBackward, grad, student, factors, source, power);
  const at::Tensor grads = grad.to(at::kDouble).contiguous();

  std::vector<at::Tensor> keep(layers);
  Gradients<FeatureGradient> gradients;
  std::vector<GradientTarget> targets;
  for (int64_t l = 0; l < layers; ++l) {
    checks::feature(kBackward, "student", l, student[l]);
    const at::ScalarType acc = accumulation(factors[l].scalar_type());
    checks::weights(kBackward, l, "factor", factors[l], acc, student[l].size(0) * positions_of(student[l]));
    GradientTarget target;
    target.source.feature = readable(student[l], acc, keep[l]);
    target.grad = gradients.add(student[l], target.source.feature).view;
    target.weights = static_cast<const char*>(factors[l].const_data_ptr());
    target.scale = grads.const_data_ptr<double>()[l];
    targets.push_back(target);
  }
  scale_features(targets, source == "probabilities" ? kIdentityPower : power);
  return gradients.finish();
}

}  // namespace

TORCH_LIBRARY_IMPL(lwkd, CPU, m) {
  m.impl("attention_divergence", attention_divergence_cpu);
  m.impl("attention_divergence_backward", attention_divergence_backward_cpu);
}

}  // namespace lwkd
