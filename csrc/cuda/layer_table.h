// What the kernels read of many layers in one launch: rows of int64 in device memory.
//
// What follows from shapes (offsets, sizes, running totals) is written once and kept; the addresses of the tensors lie
// behind it and are copied again only when one of them has moved. A copy goes through pinned memory and is not waited
// for.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "place.h"

namespace lwkd::cuda {

// Puts sections one behind the other, each on a 16-byte boundary.
class Sections {
 public:
  int64_t add(const std::vector<int64_t>& section);  // where it begins
  int64_t add_addresses(int64_t count);              // the same for addresses, which are written with every call
  int64_t addresses() const { return addresses_; }
  const std::vector<int64_t>& values() const { return values_; }

 private:
  std::vector<int64_t> values_;
  int64_t addresses_ = 0;
};

// Keeps pinned memory at hand for tables that are written while a CUDA graph is captured, when none can be asked for.
void reserve_for_captures(const Place& place);

class LayerTable {
 public:
  LayerTable() = default;
  explicit LayerTable(const Sections& sections);

  // The addresses of this call, to be filled in; all of them, in the order of Sections::add_addresses.
  std::vector<int64_t>& addresses() { return next_; }
  // Brings the device up to date; before the first launch that reads the table.
  void write(const Place& place);

  const int64_t* fixed(int64_t begin) const { return device_.const_data_ptr<int64_t>() + begin; }
  const int64_t* address(int64_t begin) const { return fixed(static_cast<int64_t>(values_.size()) + begin); }

 private:
  std::vector<int64_t> values_, written_, next_;
  at::Tensor device_;
};

// Plans by what they were made for: shapes, options, device and stream. A plan belongs to one call at a time; whoever
// finds none makes one. While a graph is captured plans are neither taken nor kept, since their tables would be
// overwritten, or freed, under a graph that still reads them.
template <class Plan>
class Plans {
 public:
  using Key = std::vector<int64_t>;

  class Lease {
   public:
    Lease(Plans* plans, Key key, std::unique_ptr<Plan> plan)
        : plans_(plans), key_(std::move(key)), plan_(std::move(plan)) {}
    Lease(Lease&&) = default;
    ~Lease() {
      if (plans_ != nullptr && plan_ != nullptr) plans_->give(std::move(key_), std::move(plan_));
    }
    Plan* operator->() { return plan_.get(); }
    Plan& operator*() { return *plan_; }

   private:
    Plans* plans_;
    Key key_;
    std::unique_ptr<Plan> plan_;
  };

  template <class Make>
  Lease take(const Place& place, Key key, const Make& make) {
    if (place.capturing()) return Lease(nullptr, {}, make());
    key.push_back(place.index());
    key.push_back(reinterpret_cast<int64_t>(place.stream()));
    std::unique_ptr<Plan> plan;
    {
      const std::lock_guard lock(mutex_);
      const auto found = plans_.find(key);
      if (found != plans_.end()) {
        plan = std::move(found->second);
        plans_.erase(found);
      }
    }
    if (plan == nullptr) plan = make();
    return Lease(this, std::move(key), std::move(plan));
  }

 private:
  static constexpr size_t kMost = 64;  // shapes that alternate; beyond them all are made again

  struct Hash {
    size_t operator()(const Key& key) const {
      uint64_t hash = 14695981039346656037ull;
      for (const int64_t word : key) hash = (hash ^ static_cast<uint64_t>(word)) * 1099511628211ull;
      return hash;
    }
  };

  void give(Key key, std::unique_ptr<Plan> plan) {
    std::unordered_map<Key, std::unique_ptr<Plan>, Hash> dropped;  // freed without the lock
    const std::lock_guard lock(mutex_);
    if (plans_.size() >= kMost) dropped.swap(plans_);
    plans_.emplace(std::move(key), std::move(plan));
  }

  std::mutex mutex_;
  std::unordered_map<Key, std::unique_ptr<Plan>, Hash> plans_;
};

// The plans of one op. Never destroyed: at the end of a process the device may be gone before us.
template <class Plan>
Plans<Plan>& plans() {
  static Plans<Plan>* const all = new Plans<Plan>;
  return *all;
}

}  // namespace lwkd::cuda
