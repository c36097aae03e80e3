// Every op of lwkd: the table of contents. Implementations are registered in the file of the op's stem, in csrc/cpu and
// csrc/cuda; fake kernels and autograd in lwkd/ops. Lists run over layers, student before teacher.

#include <torch/library.h>

TORCH_LIBRARY(lwkd, m) {
  // Features (B, C, *spatial) -> maps (B, N), their tangents where tangents were given (else an empty list), and
  // totals: the sum over N of each map before normalising (0 where it counts as empty) and of its tangent, (samples of
  // all layers, 1 or 2), float64, or float32 on CUDA. sizes: the spatial sizes of all layers, one after the other, each
  // with the rank of its feature.
  m.def(
      "attention_maps(Tensor[] features, Tensor[] tangents, float power, int[] sizes) -> (Tensor[], Tensor[], Tensor)");
  // Gradients of the features, and of the tangents where tangents were given. maps, totals: what forward returned, the
  // maps and behind them their tangents.
  m.def(
      "attention_maps_backward(Tensor[] grad_maps, Tensor[] grad_map_tangents, Tensor[] features, Tensor[] tangents, "
      "float power, int[] sizes, Tensor[] maps, Tensor totals) -> (Tensor[], Tensor[])");
  // -> divergence (L), and per layer the factor d(divergence)/d(map before normalising) at the student's own
  // resolution, (B, N) or (B, N, N): all that backward needs beside the feature. Empty list unless save_factors.
  m.def(
      "attention_divergence(Tensor[] student, Tensor[] teacher, str source, float power, str kind, float[] betas, "
      "bool save_factors) -> (Tensor, Tensor[])");
  m.def(
      "attention_divergence_backward(Tensor grad, Tensor[] student, Tensor[] factors, str source, float power) "
      "-> Tensor[]");
  // Derivatives a, b of equal shapes -> (L, 4): aa, bb, ab, dd.
  m.def("jacobian_sums(Tensor[] a, Tensor[] b) -> Tensor");
  // Gradients (of a, of b) from the gradient (L, 4) of the sums; those of b only if asked for, else an empty list.
  m.def("jacobian_sums_backward(Tensor grad, Tensor[] a, Tensor[] b, bool of_b=True) -> (Tensor[], Tensor[])");
  // -> divergence (L) formed from the sums, and the sums (L, 4), which are all that its backward needs beside a and b.
  m.def("jacobian_divergence(Tensor[] student, Tensor[] teacher, str kind) -> (Tensor, Tensor)");
  // Gradient (L, 4) of the sums, float64, from that (L) of the divergence formed from them; on the CPU only.
  m.def("jacobian_slopes(Tensor sums, Tensor grad, str kind) -> Tensor");
  // Random signs in the shapes and dtypes of like, contiguous.
  m.def("rademacher(Tensor[] like, SymInt seed) -> Tensor[]");
  // Hessian-vector products of the probe with this seed -> traces (layers); the probe is made again, not read.
  m.def("hutchinson_trace(Tensor[] products, int[] layer_of, SymInt seed, int layers) -> Tensor");
  // State and result as in lwkd.reference.RateState: average (L, S), baseline, divergences, multipliers (L),
  // counts (2) int64; none is modified.
  m.def(
      "update_rates(Tensor average, Tensor baseline, Tensor divergences, Tensor multipliers, Tensor counts, "
      "Tensor statistics, str divergence, str policy, float gamma, float momentum, float[] clamp, bool normalize, "
      "float contrast, Tensor? found_inf) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
