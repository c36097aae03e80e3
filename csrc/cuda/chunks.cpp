#include "chunks.h"

#include <algorithm>

namespace lwkd::cuda {

Arguments table_arguments(const LayerTable& table, const ChunkGroup& group) {
  Arguments arguments;
  arguments.pointer(table.address(group.addresses)).pointer(table.fixed(group.table)).pointer(table.fixed(group.ends));
  return arguments;
}

std::vector<std::pair<at::ScalarType, std::vector<int64_t>>> by_dtype(const std::vector<at::ScalarType>& dtypes) {
  std::vector<std::pair<at::ScalarType, std::vector<int64_t>>> groups;
  for (size_t i = 0; i < dtypes.size(); ++i) {
    auto alike =
        std::find_if(groups.begin(), groups.end(), [&](const auto& group) { return group.first == dtypes[i]; });
    if (alike == groups.end()) alike = groups.insert(groups.end(), {dtypes[i], {}});
    alike->second.push_back(static_cast<int64_t>(i));
  }
  return groups;
}

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
  for (auto& [dtype, members] : by_dtype(cut.dtypes)) {
    ChunkGroup group = {dtype, std::move(members), 0, 0, 0, 0};
    std::vector<int64_t> table, ends;
    for (const int64_t i : group.tensors) {
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
