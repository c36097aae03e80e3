// Launching: arguments as the kernels declare them, checked against what their images ask for.

#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <string>

#include "place.h"

namespace lwkd::cuda {

// How many programs so many elements take, or tiles, or words.
inline int64_t ceil_div(int64_t all, int64_t of_one) { return (all + of_one - 1) / of_one; }

// The run-time arguments of one launch, in the order of the kernel's signature; absent pointers are left out.
class Arguments {
 public:
  Arguments& pointer(const void* address) { return push(address); }
  Arguments& pointer(const at::Tensor& tensor) { return push(tensor.const_data_ptr()); }
  Arguments& count(int64_t value);                                           // an n_… of the kernel: int32
  Arguments& seed(int64_t value) { return push(value); }                     // int64
  Arguments& real(double value) { return push(static_cast<float>(value)); }  // float32

  int size() const { return size_; }
  int bytes(int index) const { return bytes_[index]; }
  void* slot(int index) { return &slots_[index]; }
  Arguments& hidden_pointer() { return push(static_cast<const void*>(nullptr)); }

  static constexpr int kMost = 24;

 private:
  template <class T>
  Arguments& push(T value) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    need_room();
    std::memcpy(&slots_[size_], &value, sizeof(T));
    bytes_[size_++] = sizeof(T);
    return *this;
  }
  void need_room() const;

  std::array<uint64_t, kMost> slots_{};
  std::array<int, kMost> bytes_{};
  int size_ = 0;
};

// Runs one variant of a kernel on a flat grid, on the stream of this place; nothing where there are no programs.
void launch(const Place& place, const std::string& variant, int64_t programs, Arguments arguments);

}  // namespace lwkd::cuda
