// lwkd._C: importing it registers the ops. Its functions tell what was built and what is in use, and load kernels.

#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/version.h>

#include <memory>
#include <string>

#include "cpu/multiversion.h"
#include "cuda/layer_table.h"
#include "cuda/registry.h"

namespace {

// The instruction set in which functions of several versions (multiversion.h) run on this machine.
std::string cpu_capability() {
#if LWKD_HAS_MULTIVERSION
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

// Asks the Python function for images. The function is never freed, since kernels may be loaded until the process ends.
lwkd::cuda::ImageProvider provider_of(pybind11::function find) {
  auto* kept = new pybind11::function(std::move(find));
  return [kept](const std::string& variant, int architecture) {
    const pybind11::gil_scoped_acquire gil;
    using Found = std::tuple<pybind11::bytes, std::string, std::vector<int>, int, int, int>;
    try {
      auto [bytes, entry, parameters, hidden, shared_memory, warps] = (*kept)(variant, architecture).cast<Found>();
      return lwkd::cuda::Image{bytes, entry, parameters, hidden, shared_memory, warps};
    } catch (pybind11::error_already_set& error) {
      TORCH_CHECK(false, "lwkd: no image for kernel ", variant, " on architecture ", architecture, ": ",
                  std::string(pybind11::str(error.value())));
    }
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ ops of lwkd.";
  m.def("cpu_capability", &cpu_capability, "Instruction set in use: x86-64-v4, x86-64-v3 or default.");
  m.def("threads", [] { return at::get_num_threads(); }, "Threads that the CPU ops use now.");
  m.def("has_openmp", &has_openmp, "Whether the CPU ops can use more than one thread.");
  m.def("torch_version", [] { return std::string(TORCH_VERSION); }, "Version of torch that lwkd was built with.");
  m.def(
      "set_image_provider",
      [](pybind11::function find) { lwkd::cuda::set_image_provider(provider_of(std::move(find))); },
      "Where images of kernels come from: find(variant, architecture) -> (image, entry, parameters, hidden, shared "
      "memory, warps).");
  m.def(
      "load_kernel",
      [](const std::string& variant, const std::string& device) {
        const lwkd::cuda::Place place{c10::Device(device)};
        lwkd::cuda::function(variant, place);
        lwkd::cuda::reserve_for_captures(place);
      },
      pybind11::call_guard<pybind11::gil_scoped_release>(), "Load a variant of a kernel on a device, 'cuda:0'.");
  m.def("architecture", &lwkd::cuda::architecture_of,
        "Ten times the major plus the minor compute capability of a device.");
  m.def("compiler", [] { return std::string(__VERSION__); }, "Version of the compiler that built lwkd.");
}
