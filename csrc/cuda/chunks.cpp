#include "chunks.h"

#include <algorithm>

namespace lwkd::cuda {

std::vector<ChunkGroup> group_by_dtype(const std::vector<at::ScalarType>& dtypes, int64_t operands, Sections& sections,
                                       const std::function<int64_t(int64_t, std::vector<int64_t>&)>& add_row) {
  std::vector<ChunkGroup> groups;
  for (size_t i = 0; i < dtypes.size(); ++i) {
    auto alike =
        std::find_if(groups.begin(), groups.end(), [&](const auto& group) { return group.dtype == dtypes[i]; });
    if (alike == groups.end()) alike = groups.insert(groups.end(), {dtypes[i], {}, 0, 0, 0, 0});
    alike->tensors.push_back(static_cast<int64_t>(i));
  }
  for (ChunkGroup& group : groups) {
    std::vector<int64_t> table, ends;
    for (const int64_t tensor : group.tensors) {
      group.programs += add_row(tensor, table);
      ends.push_back(group.programs);
    }
    group.table = sections.add(table);
    group.ends = sections.add(ends);
    group.addresses = sections.add_addresses(operands * group.rows());
  }
  return groups;
}

ChunkPlan::ChunkPlan(const Cut& cut, int64_t operands) {
  const int64_t tensors = static_cast<int64_t>(cut.elements.size());
  std::vector<int64_t> counts(cut.layers), following(cut.layers), first(tensors), fields;
  for (int64_t i = 0; i < tensors; ++i) counts[cut.layer_of[i]] += cut.chunks[i];
  for (int64_t l = 0; l < cut.layers; ++l) {
    fields.insert(fields.end(), {partials, counts[l]});
    following[l] = partials;
    partials += counts[l];
  }
  for (int64_t i = 0; i < tensors; ++i) {
    first[i] = following[cut.layer_of[i]];
    following[cut.layer_of[i]] += cut.chunks[i];
  }
  Sections sections;
  layers = sections.add(fields);
  groups = group_by_dtype(cut.dtypes, operands, sections, [&](int64_t i, std::vector<int64_t>& rows) {
    rows.insert(rows.end(), {cut.elements[i], i, first[i]});  // CHUNK_FIELDS, as the kernels read them
    return cut.chunks[i];
  });
  table = LayerTable(sections);
}

}  // namespace lwkd::cuda
