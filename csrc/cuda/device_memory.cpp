#include "device_memory.h"

#include <ATen/ops/from_blob.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

namespace lwkd::cuda {
namespace {

constexpr int64_t kWordBytes = sizeof(int64_t);
constexpr int64_t kSmallest = 128;        // words of a block: 1 KiB, and a power of two from there
constexpr int64_t kSlab = (2 << 20) / 8;  // words: less takes as much of the device, which is mapped by 2 MiB

// While any thread captures a graph, allocating is refused, unless this thread says that it does not mind.
class Uncaptured {
 public:
  Uncaptured() { check(driver().exchange_capture_mode(&mode_), "leaving the mode of captures"); }
  ~Uncaptured() { driver().exchange_capture_mode(&mode_); }

 private:
  int mode_ = kRelaxedCapture;
};

class DeviceMemory {
 public:
  using Bin = std::tuple<int, Stream, int64_t>;  // device, stream, words of a block

  DevicePointer take(const Bin& bin) {
    const std::lock_guard lock(mutex_);
    std::vector<DevicePointer>& free = free_[bin];
    if (free.empty()) return cut(std::get<0>(bin), std::get<2>(bin));
    const DevicePointer block = free.back();
    free.pop_back();
    return block;
  }

  void give(const Bin& bin, DevicePointer block) {
    const std::lock_guard lock(mutex_);
    free_[bin].push_back(block);
  }

 private:
  struct Slab {
    DevicePointer next = 0;
    int64_t left = 0;
  };

  DevicePointer cut(int device, int64_t words) {
    Slab& slab = slabs_[device];
    if (slab.left < words) {
      const int64_t all = std::max(words, kSlab);
      const Uncaptured meanwhile;
      DevicePointer memory = 0;
      check(driver().allocate(&memory, static_cast<size_t>(all * kWordBytes)),
            "asking for " + std::to_string(all * kWordBytes) + " bytes on device " + std::to_string(device) +
                ", besides those that torch holds (torch.cuda.empty_cache() gives back what it does not use)");
      slab = {memory, all};
    }
    const DevicePointer block = slab.next;
    slab.next += static_cast<DevicePointer>(words * kWordBytes);
    slab.left -= words;
    return block;
  }

  std::mutex mutex_;
  std::map<Bin, std::vector<DevicePointer>> free_;
  std::map<int, Slab> slabs_;
};

// Never destroyed: at the end of a process the driver may be gone before us.
DeviceMemory& device_memory() {
  static DeviceMemory* const all = new DeviceMemory;
  return *all;
}

}  // namespace

at::Tensor kept_words(int64_t words, const Place& place) {
  TORCH_CHECK(!place.capturing(), "lwkd: memory that is kept was asked for while a CUDA graph is captured.");
  int64_t block_words = kSmallest;
  while (block_words < words) block_words *= 2;
  const DeviceMemory::Bin bin = {place.index(), place.stream(), block_words};
  const DevicePointer block = device_memory().take(bin);
  return at::from_blob(
      reinterpret_cast<void*>(block), {words}, [bin, block](void*) { device_memory().give(bin, block); },
      at::TensorOptions().dtype(at::kLong).device(place.device()), place.device());
}

}  // namespace lwkd::cuda
