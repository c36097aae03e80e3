// The kernels that are loaded: one function for each variant and device.

#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "place.h"

namespace lwkd::cuda {

// What a compiler made of one variant of a kernel for one architecture.
struct Image {
  std::string bytes;            // cubin, or PTX that ends in a NUL
  std::string entry;            // name of the kernel in it
  std::vector<int> parameters;  // bytes of each run-time parameter, in order
  int hidden = 0;               // pointers that the compiler put behind them
  int shared_memory = 0;        // bytes of dynamic shared memory
  int warps = 0;
};

struct Function {
  std::string variant;
  FunctionHandle handle = nullptr;
  std::vector<int> parameters;
  int hidden = 0;
  unsigned shared_memory = 0;
  unsigned threads = 0;
};

// The image of a variant, which is named as by Variant (launch.h), for an architecture (10 * major + minor).
using ImageProvider = std::function<Image(const std::string& variant, int architecture)>;

// Where images come from: the Python side, which finds or compiles them. What was loaded from elsewhere is forgotten.
void set_image_provider(ImageProvider provider);

// 10 * major + minor of the compute capability.
int architecture_of(int device);

// The function of a variant on the device of this place; its image is loaded at the first call. Functions are never
// unloaded: when the process ends the driver may be gone before us.
const Function& function(const std::string& variant, const Place& place);

}  // namespace lwkd::cuda
