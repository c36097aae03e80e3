// update_rates on the CPU: statistics -> momentum average -> divergence -> policy -> multipliers, in float64.

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../checks.h"
#include "../distances.h"

namespace lwkd {
namespace {

enum class Policy { relative, decay, local, constant };

Policy policy_of(c10::string_view name) {
  if (name == "relative") return Policy::relative;
  if (name == "decay") return Policy::decay;
  return name == "local" ? Policy::local : Policy::constant;
}

double mean_of(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) sum += value;
  return sum / static_cast<double>(values.size());
}

// m = (c / c_L)^(gamma strength) (1 + (largest - 1) strength rise), with c the largest divergence up to a layer.
void local_multipliers(const std::vector<double>& e, double gamma, double largest, double contrast,
                       std::vector<double>& multipliers) {
  const double most = *std::max_element(e.begin(), e.end());
  const double strength = std::max(0.0, 1 - contrast * e[0] / most);
  double before = 0;
  for (size_t l = 0; l < e.size(); ++l) {
    const double share = std::max(before, e[l] / most);
    multipliers[l] = std::pow(share, gamma * strength) * (1 + (largest - 1) * strength * (share - before));
    before = share;
  }
}

std::vector<double> multipliers_of(Policy policy, const std::vector<double>& e, const float* baseline, double gamma,
                                   at::ArrayRef<double> clamp, bool normalize, double contrast) {
  std::vector<double> multipliers(e.size());
  if (policy == Policy::local) {
    local_multipliers(e, gamma, clamp[1], contrast, multipliers);
  } else {
    const double mean = mean_of(e);
    for (size_t l = 0; l < e.size(); ++l) {
      const double start = policy == Policy::relative ? mean : static_cast<double>(baseline[l]);
      multipliers[l] = std::pow(e[l] == 0 && start == 0 ? 1.0 : e[l] / start, gamma);
    }
  }
  for (double& multiplier : multipliers) multiplier = std::clamp(multiplier, clamp[0], clamp[1]);
  if (normalize) {
    const double mean_multiplier = mean_of(multipliers);
    for (double& multiplier : multipliers) multiplier /= mean_multiplier;
  }
  return multipliers;
}

// Without clone(), which takes longer for the few numbers of a state than all that is computed from them.
at::Tensor copy(const at::Tensor& t) {
  at::Tensor made = at::detail::empty_cpu(t.sizes(), t.scalar_type());
  const at::Tensor source = t.contiguous();
  std::memcpy(made.mutable_data_ptr(), source.const_data_ptr(), source.nbytes());
  return made;
}

using State = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

State update_rates_cpu(const at::Tensor& average,      // (L, S)
                       const at::Tensor& baseline,     // (L,)
                       const at::Tensor& divergences,  // (L,)
                       const at::Tensor& multipliers,  // (L,)
                       const at::Tensor& counts,       // (2,) int64: measured, skipped
                       const at::Tensor& statistics,   // (L, S)
                       c10::string_view divergence, c10::string_view policy, double gamma, double momentum,
                       at::ArrayRef<double> clamp, bool normalize, double contrast,
                       const std::optional<at::Tensor>& found_inf) {
  checks::rate_rule(divergence, policy, gamma, momentum, clamp, contrast);
  const Ratio ratio = ratio_of(divergence);
  const int64_t columns = statistics_of(ratio);
  checks::rate_tensors(average, baseline, divergences, multipliers, counts, statistics, divergence, columns);
  const int64_t layers = statistics.size(0);

  at::Tensor new_average = copy(average), new_baseline = copy(baseline), new_divergences = copy(divergences);
  at::Tensor new_multipliers = copy(multipliers), new_counts = copy(counts);
  const State result = {new_average, new_baseline, new_divergences, new_multipliers, new_counts};
  if (found_inf.has_value() && found_inf->ne(0).any().item<bool>()) return result;

  const at::Tensor measured = statistics.contiguous();
  const float* now = measured.const_data_ptr<float>();
  float* past = new_average.mutable_data_ptr<float>();
  int64_t* count = new_counts.mutable_data_ptr<int64_t>();
  const bool first = count[0] == 0;
  bool finite = true, all_zero = true;
  std::vector<float> mixed(layers * columns);
  std::vector<double> e(layers);
  for (int64_t l = 0; l < layers; ++l) {
    double of_layer[4];
    for (int64_t k = 0; k < columns; ++k) {
      const int64_t i = l * columns + k;
      mixed[i] = first ? now[i] : static_cast<float>(momentum * past[i] + (1 - momentum) * now[i]);
      of_layer[k] = mixed[i];
      finite = finite && std::isfinite(now[i]);
    }
    e[l] = static_cast<float>(distance_of(ratio, of_layer));  // as the state holds it
    finite = finite && std::isfinite(e[l]);
    all_zero = all_zero && e[l] == 0;
  }
  if (!finite || all_zero) {
    ++count[1];
    return result;
  }
  ++count[0];
  std::copy(mixed.begin(), mixed.end(), past);
  if (first) std::copy(e.begin(), e.end(), new_baseline.mutable_data_ptr<float>());
  std::copy(e.begin(), e.end(), new_divergences.mutable_data_ptr<float>());
  if (policy_of(policy) == Policy::constant) return result;
  const std::vector<double> rates =
      multipliers_of(policy_of(policy), e, new_baseline.const_data_ptr<float>(), gamma, clamp, normalize, contrast);
  std::copy(rates.begin(), rates.end(), new_multipliers.mutable_data_ptr<float>());
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(lwkd, CPU, m) { m.impl("update_rates", update_rates_cpu); }

}  // namespace lwkd
