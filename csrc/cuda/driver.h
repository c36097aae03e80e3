// The part of the CUDA driver that launching needs. It is found at run time, so that one build serves machines with
// and without a GPU, and no CUDA toolkit is asked for.

#pragma once

#include <cstddef>
#include <string>

namespace lwkd::cuda {

// Handles and constants of the driver's stable interface, as far as they are used here.
using Context = void*;
using Module = void*;
using FunctionHandle = void*;
using Stream = void*;
using DevicePointer = unsigned long long;

constexpr int kComputeCapabilityMajor = 75, kComputeCapabilityMinor = 76;  // attributes of a device
constexpr int kMaxDynamicSharedMemory = 8;                                 // attribute of a function
constexpr int kNotCapturing = 0;
constexpr int kRelaxedCapture = 2;  // mode of a thread: what it does besides has no part in any capture

struct Driver {
  int (*init)(unsigned flags);
  int (*get_error_name)(int result, const char** name);
  int (*get_error_string)(int result, const char** text);
  int (*get_device)(int* device, int ordinal);
  int (*get_device_attribute)(int* value, int attribute, int device);
  int (*get_current_context)(Context*);
  int (*set_current_context)(Context);
  int (*retain_primary_context)(Context*, int device);
  int (*load_module)(Module*, const void* image);
  int (*get_function)(FunctionHandle*, Module, const char* name);
  int (*set_function_attribute)(FunctionHandle, int attribute, int value);
  int (*allocate)(DevicePointer*, size_t bytes);
  int (*stream_is_capturing)(Stream, int* status);
  int (*exchange_capture_mode)(int* mode);
  int (*launch_kernel)(FunctionHandle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                       unsigned block_y, unsigned block_z, unsigned shared, Stream, void** parameters, void** extra);
};

// Loads and initialises the driver at the first call. LWKD_CUDA_DRIVER names another library than libcuda.so.1.
const Driver& driver();

// Raises unless the result is success: what was tried, and the driver's own words.
void check(int result, const std::string& what);

}  // namespace lwkd::cuda
