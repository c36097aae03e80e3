#include "layer_table.h"

#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>

#include <cstring>

#include "device_memory.h"

namespace lwkd::cuda {
namespace {

constexpr int64_t kAlignment = 2;  // int64 words in 16 bytes

int64_t padded(int64_t words) { return (words + kAlignment - 1) / kAlignment * kAlignment; }

at::Tensor pinned(int64_t words, const Place& place) {
  return at::empty({words}, at::TensorOptions().dtype(at::kLong).pinned_memory(place.device().is_cuda()));
}

// A graph copies from host memory whenever it is replayed, so what was written there during the capture must stay; and
// pinned memory cannot be allocated while capturing. So some is reserved, of which captures take and never give back.
class CapturedMemory {
 public:
  void reserve(const Place& place) {
    const std::lock_guard lock(mutex_);
    if (memory_.defined() && kWords - used_ >= kWords / 2) return;
    memory_ = pinned(kWords, place);
    kept_.push_back(memory_);
    used_ = 0;
  }

  at::Tensor take(int64_t words) {
    const std::lock_guard lock(mutex_);
    TORCH_CHECK(memory_.defined() && used_ + words <= kWords, "lwkd: no pinned memory is left for a call of ", words,
                " words while a CUDA graph is captured. Run one step before the "
                "capture, or call lwkd.warmup(device).");
    used_ += words;
    return memory_.narrow(0, used_ - words, words);
  }

 private:
  static constexpr int64_t kWords = 1 << 18;  // 2 MiB
  std::mutex mutex_;
  at::Tensor memory_;
  std::vector<at::Tensor> kept_;
  int64_t used_ = 0;
};

CapturedMemory& captured_memory() {
  static CapturedMemory* const reserve = new CapturedMemory;
  return *reserve;
}

template <class TensorOf>
bool fill_rows(int64_t* next, size_t rows, const Operands& operands, const TensorOf& tensor_of) {
  bool aligned = true;
  for (size_t row = 0; row < rows; ++row) {
    for (const Operand& operand : operands) {
      *next = reinterpret_cast<int64_t>((*operand.tensors)[tensor_of(row)].const_data_ptr());
      aligned = aligned && (!operand.wide || *next % 16 == 0);
      ++next;
    }
  }
  return aligned;
}

}  // namespace

void reserve_for_captures(const Place& place) { captured_memory().reserve(place); }

int64_t Sections::add(const std::vector<int64_t>& section) {
  const int64_t begin = static_cast<int64_t>(values_.size());
  values_.insert(values_.end(), section.begin(), section.end());
  values_.resize(padded(static_cast<int64_t>(values_.size())));
  return begin;
}

int64_t Sections::add_addresses(int64_t count) {
  const int64_t begin = addresses_;
  addresses_ += padded(count);
  return begin;
}

LayerTable::LayerTable(const Sections& sections) : values_(sections.values()), next_(sections.addresses()) {}

bool LayerTable::fill(int64_t section, const std::vector<int64_t>& rows, const Operands& operands) {
  return fill_rows(next_.data() + section, rows.size(), operands, [&](size_t i) { return rows[i]; });
}

bool LayerTable::fill(int64_t section, const Operands& operands) {
  return fill_rows(next_.data() + section, operands[0].tensors->size(), operands, [](size_t i) { return i; });
}

Arguments LayerTable::arguments(int64_t addresses, int64_t table, int64_t ends) const {
  Arguments arguments;
  arguments.pointer(address(addresses)).pointer(fixed(table)).pointer(fixed(ends));
  return arguments;
}

void LayerTable::write(const Place& place) {
  const bool fresh = !device_.defined();
  if (!fresh && written_ == next_) return;
  // A tensor that was made in inference mode cannot be written outside of it.
  const c10::InferenceMode off(false);
  const int64_t fixed = static_cast<int64_t>(values_.size()), all = fixed + static_cast<int64_t>(next_.size());
  const int64_t begin = fresh ? 0 : fixed;
  if (fresh && place.capturing())
    device_ = at::empty({all}, at::TensorOptions().dtype(at::kLong).device(place.device()));  // from the graph's pool
  else if (fresh)
    device_ = kept_words(all, place);
  if (!place.capturing()) reserve_for_captures(place);
  const at::Tensor source = place.capturing() ? captured_memory().take(all - begin) : pinned(all - begin, place);
  int64_t* words = source.mutable_data_ptr<int64_t>();
  if (fresh) std::memcpy(words, values_.data(), values_.size() * sizeof(int64_t));
  std::memcpy(words + fixed - begin, next_.data(), next_.size() * sizeof(int64_t));
  device_.narrow(0, begin, all - begin).copy_(source, /*non_blocking=*/true);
  written_ = next_;
}

}  // namespace lwkd::cuda
