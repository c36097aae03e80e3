// Where one call of an op runs: the device of its tensors, and the stream that is current there.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include "driver.h"

namespace lwkd::cuda {

// Alive for the length of a call; the device is current on this thread meanwhile. The launcher's tests, which replace
// the driver, hand over CPU tensors: those have device 0 and no stream.
class Place {
 public:
  explicit Place(c10::Device device);
  explicit Place(const at::Tensor& tensor) : Place(tensor.device()) {}

  c10::Device device() const { return device_; }
  int index() const { return device_.has_index() ? device_.index() : 0; }
  Stream stream() const { return stream_; }
  bool capturing() const { return capturing_; }  // a CUDA graph, at this moment

 private:
  c10::Device device_;
  c10::DeviceGuard guard_;
  Stream stream_;
  bool capturing_;
};

}  // namespace lwkd::cuda
