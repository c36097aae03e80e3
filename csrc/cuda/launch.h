// Launching: the name of a kernel's variant, and arguments as the kernel declares them, checked against what its image
// asks for.

#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <string>

#include "place.h"

namespace lwkd::cuda {

// How many programs, tiles or words it takes for all of something.
inline int64_t ceil_div(int64_t all, int64_t of_one) { return (all + of_one - 1) / of_one; }

// What the elements of a tensor are called in a kernel.
inline const char* element_of(at::ScalarType dtype) {
  return dtype == at::kHalf ? "fp16" : dtype == at::kBFloat16 ? "bf16" : dtype == at::kDouble ? "fp64" : "fp32";
}

// The name of one variant of a kernel: its absent pointers and its constants, in the order of the kernel's signature,
// as in "jacobian_sums_fwd ELEMENT=fp32 ALIGNED=1 CHUNK=8192 STEP=1024 num_warps=4".
class Variant {
 public:
  explicit Variant(const char* kernel) : text_(kernel) { text_.reserve(160); }

  Variant& pointer(const char* name, bool present) { return present ? *this : set(name, "None"); }
  Variant& set(const char* name, const char* word) {
    text_.append(1, ' ').append(name).append(1, '=').append(word);
    return *this;
  }
  Variant& set(const char* name, int64_t number) { return set(name, std::to_string(number).c_str()); }
  // The last word.
  const std::string& warps(int64_t count) { return set("num_warps", count).text_; }

 private:
  std::string text_;
};

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
