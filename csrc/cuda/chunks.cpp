#include "chunks.h"

#include <algorithm>

namespace lwkd::cuda {

ChunkPlan plan_chunks(const Cut& cut, int64_t operands, Sections& sections) {
  const int64_t tensors = static_cast<int64_t>(cut.elements.size());
  std::vector<int64_t> counts(cut.layers), following(cut.layers), first(tensors), layers;
  for (int64_t i = 0; i < tensors; ++i) counts[cut.layer_of[i]] += cut.chunks[i];
  ChunkPlan plan;
  for (int64_t l = 0; l < cut.layers; ++l) {
    layers.insert(layers.end(), {plan.partials, counts[l]});
    following[l] = plan.partials;
    plan.partials += counts[l];
  }
  plan.layers = sections.add(layers);
  for (int64_t i = 0; i < tensors; ++i) {
    first[i] = following[cut.layer_of[i]];
    following[cut.layer_of[i]] += cut.chunks[i];
  }
  std::vector<at::ScalarType> dtypes;
  for (const at::ScalarType dtype : cut.dtypes)
    if (std::find(dtypes.begin(), dtypes.end(), dtype) == dtypes.end()) dtypes.push_back(dtype);
  for (const at::ScalarType dtype : dtypes) {
    ChunkGroup group = {dtype, {}, 0, 0, 0, 0};
    std::vector<int64_t> table, ends;
    for (int64_t i = 0; i < tensors; ++i) {
      if (cut.dtypes[i] != dtype) continue;
      group.tensors.push_back(i);
      table.insert(table.end(), {cut.elements[i], i, first[i]});
      group.programs += cut.chunks[i];
      ends.push_back(group.programs);
    }
    group.table = sections.add(table);
    group.ends = sections.add(ends);
    group.addresses = sections.add_addresses(operands * static_cast<int64_t>(group.tensors.size()));
    plan.groups.push_back(std::move(group));
  }
  return plan;
}

bool fill_addresses(const ChunkGroup& group, const std::vector<const std::vector<at::Tensor>*>& operands,
                    std::vector<int64_t>& addresses) {
  int64_t* next = addresses.data() + group.addresses;
  bool aligned = true;
  for (const int64_t tensor : group.tensors) {
    for (const auto* operand : operands) {
      *next = reinterpret_cast<int64_t>((*operand)[tensor].const_data_ptr());
      aligned = aligned && *next % 16 == 0;
      ++next;
    }
  }
  return aligned;
}

}  // namespace lwkd::cuda
