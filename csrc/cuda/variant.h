// The name of one variant of a kernel: its absent pointers and its constants, in the order of the kernel's signature.

#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace lwkd::cuda {

// What the elements of a tensor are called in a kernel.
inline const char* element_of(at::ScalarType dtype) {
  return dtype == at::kHalf ? "fp16" : dtype == at::kBFloat16 ? "bf16" : dtype == at::kDouble ? "fp64" : "fp32";
}

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

}  // namespace lwkd::cuda
