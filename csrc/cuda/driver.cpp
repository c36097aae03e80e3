#include "driver.h"

#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <cstdlib>

namespace lwkd::cuda {
namespace {

template <class Function>
void find(void* library, const char* name, const std::string& file, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  TORCH_CHECK(function != nullptr, "lwkd: the CUDA driver ", file, " has no function ", name,
              ". Install a driver for CUDA 12 or newer.");
}

Driver load() {
  const char* named = std::getenv("LWKD_CUDA_DRIVER");
  const std::string file = named != nullptr ? named : "libcuda.so.1";
  void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library != nullptr, "lwkd: the CUDA driver was looked for as ", file, " and cannot be loaded (",
              dlerror(), "). Install NVIDIA's driver, or name the library in LWKD_CUDA_DRIVER.");
  Driver found;
  find(library, "cuInit", file, found.init);
  find(library, "cuGetErrorName", file, found.get_error_name);
  find(library, "cuGetErrorString", file, found.get_error_string);
  find(library, "cuDeviceGet", file, found.get_device);
  find(library, "cuDeviceGetAttribute", file, found.get_device_attribute);
  find(library, "cuCtxGetCurrent", file, found.get_current_context);
  find(library, "cuCtxSetCurrent", file, found.set_current_context);
  find(library, "cuDevicePrimaryCtxRetain", file, found.retain_primary_context);
  find(library, "cuModuleLoadData", file, found.load_module);
  find(library, "cuModuleGetFunction", file, found.get_function);
  find(library, "cuFuncSetAttribute", file, found.set_function_attribute);
  find(library, "cuMemAlloc_v2", file, found.allocate);
  find(library, "cuStreamIsCapturing", file, found.stream_is_capturing);
  find(library, "cuThreadExchangeStreamCaptureMode", file, found.exchange_capture_mode);
  find(library, "cuLaunchKernel", file, found.launch_kernel);
  const int result = found.init(0);
  TORCH_CHECK(result == 0, "lwkd: the CUDA driver ", file, " cannot be initialised (error ", result,
              "). Is there a GPU, and may this process use it?");
  return found;
}

}  // namespace

const Driver& driver() {
  static const Driver loaded = load();  // tried again at the next call where it failed
  return loaded;
}

void check(int result, const std::string& what) {
  if (result == 0) return;
  const char *name = nullptr, *text = nullptr;
  driver().get_error_name(result, &name);
  driver().get_error_string(result, &text);
  TORCH_CHECK(false, "lwkd: ", what, ": the CUDA driver answers ", name != nullptr ? name : "error", " (", result,
              "), ", text != nullptr ? text : "which it does not explain",
              ". After an error on the device the process cannot use it any more; errors of earlier kernels show here "
              "too: run with CUDA_LAUNCH_BLOCKING=1 to find the first.");
}

}  // namespace lwkd::cuda
