// Device memory that is kept from call to call, from the driver itself.
//
// Not from torch: what torch allocates in the warm-up of torch.compile's graph trees, or under torch.cuda.use_mem_pool,
// lies in a pool that is not ours. A block that stays alive there is an error at the next check of the pool, or its
// memory is used again under us.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "place.h"

namespace lwkd::cuda {

// So many int64, not initialised. Memory of a tensor that is freed goes to later tensors of the same stream only, whose
// writes come after whatever still reads it; it is never given back to the driver, which would wait for the device.
// Not while a graph is captured.
at::Tensor kept_words(int64_t words, const Place& place);

}  // namespace lwkd::cuda
