// What a kernel must know of many layers that it handles in one launch: rows of int64 in device memory.
//
// What follows from shapes (offsets, sizes, running totals) is written once and kept. The addresses of the tensors lie
// behind it and are copied again only when a tensor has moved. Copies go through pinned memory and are asynchronous.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "launch.h"

namespace lwkd::cuda {

// The sections of a table, one behind the other, each on a 16-byte boundary. Both functions return where one begins.
class Sections {
 public:
  int64_t add(const std::vector<int64_t>& section);
  int64_t add_addresses(int64_t count);  // to be filled in at every call
  int64_t addresses() const { return addresses_; }
  const std::vector<int64_t>& values() const { return values_; }

 private:
  std::vector<int64_t> values_;
  int64_t addresses_ = 0;
};

// One list of tensors that a launch reads or writes, of which each row of a table takes one.
struct Operand {
  const std::vector<at::Tensor>* tensors;
  bool wide;  // in loads of 16 bytes, where all addresses are at multiples of 16

  Operand(const std::vector<at::Tensor>* tensors, bool wide = true) : tensors(tensors), wide(wide) {}
};

using Operands = std::vector<Operand>;

// Reserves pinned memory for tables that are written while a CUDA graph is captured, when none can be allocated.
void reserve_for_captures(const Place& place);

class LayerTable {
 public:
  LayerTable() = default;
  explicit LayerTable(const Sections& sections);

  // The addresses of this call, to be filled in; all of them, in the order of Sections::add_addresses.
  std::vector<int64_t>& addresses() { return next_; }
  // Fills in one section: for each row the address of the tensor with that number in each operand. Returns whether all
  // addresses of wide operands are at multiples of 16.
  bool fill(int64_t section, const std::vector<int64_t>& rows, const Operands& operands);
  // The same with a row for every tensor.
  bool fill(int64_t section, const Operands& operands);
  // Brings the device up to date; before the first launch that reads the table.
  void write(const Place& place);

  // The arguments that the kernels over rows of tensors begin with.
  Arguments arguments(int64_t addresses, int64_t table, int64_t ends) const;
  const int64_t* fixed(int64_t begin) const { return device_.const_data_ptr<int64_t>() + begin; }
  const int64_t* address(int64_t begin) const { return fixed(static_cast<int64_t>(values_.size()) + begin); }

 private:
  std::vector<int64_t> values_, written_, next_;
  at::Tensor device_;
};

// Plans by what they were made for: shapes, options, device and stream. A call takes a plan for itself and gives it
// back when it ends; where none is left a new one is made. While a graph is captured plans are neither taken nor kept,
// since the graph reads their tables whenever it is replayed, and they must not be overwritten or freed until then.
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
  static constexpr size_t kMost = 64;  // shapes that alternate; one more and all are dropped

  struct Hash {
    size_t operator()(const Key& key) const {
      uint64_t hash = 14695981039346656037ull;
      for (const int64_t word : key) hash = (hash ^ static_cast<uint64_t>(word)) * 1099511628211ull;
      return hash;
    }
  };

  void give(Key key, std::unique_ptr<Plan> plan) {
    std::unordered_map<Key, std::unique_ptr<Plan>, Hash> dropped;  // freed after the lock is released
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
