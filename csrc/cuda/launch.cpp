#include "launch.h"

#include <c10/util/Exception.h>

#include <limits>

#include "registry.h"

namespace lwkd::cuda {
namespace {

constexpr int64_t kMostPrograms = std::numeric_limits<int32_t>::max();  // of the first dimension of a grid

void check_arguments(const Function& function, const Arguments& arguments) {
  const int expected = static_cast<int>(function.parameters.size());
  TORCH_CHECK(arguments.size() == expected, "lwkd: kernel ", function.variant, ": its image takes ", expected,
              " arguments, ", arguments.size(), " are given. The image is of another version of lwkd.");
  for (int i = 0; i < expected; ++i)
    TORCH_CHECK(arguments.bytes(i) == function.parameters[i], "lwkd: kernel ", function.variant, ": its argument ", i,
                " has ", function.parameters[i], " bytes in the image, ", arguments.bytes(i),
                " are given. The image is of another version of lwkd.");
}

}  // namespace

Arguments& Arguments::count(int64_t value) {
  TORCH_CHECK(value >= 0 && value <= std::numeric_limits<int32_t>::max(), "lwkd: a kernel counts ", value,
              " rows, more than 32 bits hold.");
  return push(static_cast<int32_t>(value));
}

void Arguments::need_room() const { TORCH_CHECK(size_ < kMost, "lwkd: a kernel has more than ", kMost, " arguments."); }

void launch(const Place& place, const std::string& variant, int64_t programs, Arguments arguments) {
  if (programs == 0) return;
  TORCH_CHECK(programs > 0 && programs <= kMostPrograms, "lwkd: kernel ", variant, " would need ", programs,
              " programs, a grid holds ", kMostPrograms, ". Measure fewer samples at a time.");
  const Function& kernel = function(variant, place);
  check_arguments(kernel, arguments);
  for (int i = 0; i < kernel.hidden; ++i) arguments.hidden_pointer();
  std::array<void*, Arguments::kMost> slots;
  for (int i = 0; i < arguments.size(); ++i) slots[i] = arguments.slot(i);
  const int result = driver().launch_kernel(kernel.handle, static_cast<unsigned>(programs), 1, 1, kernel.threads, 1, 1,
                                            kernel.shared_memory, place.stream(), slots.data(), nullptr);
  if (result != 0)
    check(result, "launching kernel " + variant + " with " + std::to_string(programs) + " programs on device " +
                      std::to_string(place.index()));
}

}  // namespace lwkd::cuda
