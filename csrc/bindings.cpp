// lwkd._C: importing it registers the ops; its few functions say what was built and what is in use.

#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <string>

#include "clones.h"

namespace {

// The instruction set that the function clones run with on this machine.
std::string cpu_capability() {
#if LWKD_HAS_CLONES
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
  return "default";
}

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ ops of lwkd.";
  m.def("cpu_capability", &cpu_capability, "Instruction set in use: x86-64-v4, x86-64-v3 or default.");
  m.def("threads", [] { return at::get_num_threads(); }, "Threads that the CPU ops use now.");
  m.def("has_openmp", &has_openmp, "Whether the CPU ops can use more than one thread.");
  m.def("torch_version", [] { return std::string(TORCH_VERSION); }, "Version of torch that lwkd was built with.");
  m.def("compiler", [] { return std::string(__VERSION__); }, "Version of the compiler that built lwkd.");
}
