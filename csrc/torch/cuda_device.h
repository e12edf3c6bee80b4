#pragma once

#include <memory>

#include "device/device.h"

namespace dualpipe {

// A GPU by its index in this process. Its compute stream is the one that is torch's current stream
// when a step begins; message streams have the highest priority; memory comes from torch's caching
// allocator.
[[nodiscard]] std::shared_ptr<Device> cuda_device(int index, bool reductions_may_wait);

// The clock of a GPU, for stages that run on it, no matter how their messages travel.
[[nodiscard]] StopwatchMaker cuda_stopwatches(int index);

}  // namespace dualpipe
