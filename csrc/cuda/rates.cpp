// update_rates on CUDA: one launch of one program; kernel in kernels/rates.py. Legend: L layers, S statistics a layer.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "../checks.h"
#include "../distances.h"
#include "../memory_layout.h"
#include "launch.h"

namespace lwkd::cuda {
namespace {

constexpr int64_t kMostLayers = 512;
constexpr int64_t kWarps = 4;

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> update_rates_cuda(  //
    const at::Tensor& average,                                                             // (L, S)
    const at::Tensor& baseline,                                                            // (L,)
    const at::Tensor& divergences,                                                         // (L,)
    const at::Tensor& multipliers,                                                         // (L,)
    const at::Tensor& counts,      // (2,) int64: measured, skipped
    const at::Tensor& statistics,  // (L, S)
    c10::string_view divergence, c10::string_view policy, double gamma, double momentum, at::ArrayRef<double> clamp,
    bool normalize, double contrast, const std::optional<at::Tensor>& found_inf) {
  checks::rate_rule(divergence, policy, gamma, momentum, clamp, contrast);
  const int64_t columns = statistics_of(ratio_of(divergence));
  checks::rate_tensors(average, baseline, divergences, multipliers, counts, statistics, divergence, columns);
  const int64_t layers = statistics.size(0);
  TORCH_CHECK_VALUE(layers <= kMostLayers, "lwkd.ops.update_rates: expected at most ", kMostLayers,
                    " layers on a GPU, found ", layers, ". Pair fewer layers.");
  const std::vector<at::Tensor> old = {average.contiguous(),     baseline.contiguous(), divergences.contiguous(),
                                       multipliers.contiguous(), counts.contiguous(),   statistics.contiguous()};
  const char* const names[] = {"average", "baseline", "divergences", "multipliers", "counts", "statistics"};
  for (size_t i = 0; i < old.size(); ++i)
    checks::on_gpu(std::string("lwkd.ops.update_rates: ") + names[i], old[i], statistics.device());
  std::optional<at::Tensor> infinite;
  if (found_inf.has_value()) {
    checks::on_gpu("lwkd.ops.update_rates: found_inf", *found_inf, statistics.device());
    infinite = found_inf->to(at::kFloat).contiguous();
  }
  const Place place(statistics);
  const std::vector<at::Tensor> changed = {empty_contiguous(average), empty_contiguous(baseline),
                                           empty_contiguous(divergences), empty_contiguous(multipliers),
                                           empty_contiguous(counts)};
  Arguments arguments;
  for (const at::Tensor& t : old) arguments.pointer(t);
  if (infinite.has_value()) arguments.pointer(*infinite);
  for (const at::Tensor& t : changed) arguments.pointer(t);
  arguments.count(layers).real(gamma).real(momentum).real(clamp[0]).real(clamp[1]).real(contrast);
  Variant variant("rates_update_fwd");
  variant.pointer("found_inf_ptr", infinite.has_value()).set("DIVERGENCE", std::string(divergence).c_str());
  variant.set("POLICY", std::string(policy).c_str()).set("NORMALIZE", normalize);
  variant.set("STATISTICS", columns).set("BLOCK", kMostLayers);
  launch(place, variant.warps(kWarps), 1, arguments);
  return {changed[0], changed[1], changed[2], changed[3], changed[4]};
}

}  // namespace

TORCH_LIBRARY_IMPL(lwkd, CUDA, m) { m.impl("update_rates", update_rates_cuda); }

}  // namespace lwkd::cuda
