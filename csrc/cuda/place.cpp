#include "place.h"

#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace lwkd::cuda {
namespace {

Stream current_stream(c10::Device device) {
  if (!device.is_cuda()) return nullptr;
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

// Autograd runs backward on a thread of its own, where nobody may have made a context current yet.
void need_context(int index) {
  Context context = nullptr;
  check(driver().get_current_context(&context), "asking for the current context");
  if (context != nullptr) return;
  int device = 0;
  check(driver().get_device(&device, index), "asking for device " + std::to_string(index));
  check(driver().retain_primary_context(&context, device), "retaining the context of device " + std::to_string(index));
  check(driver().set_current_context(context), "making the context of device " + std::to_string(index) + " current");
}

bool is_capturing(Stream stream) {
  int status = kNotCapturing;
  check(driver().stream_is_capturing(stream, &status), "asking whether a graph is captured");
  return status != kNotCapturing;
}

}  // namespace

Place::Place(c10::Device device) : device_(device), guard_(device), stream_(current_stream(device)), capturing_(false) {
  need_context(index());
  capturing_ = is_capturing(stream_);
}

}  // namespace lwkd::cuda
