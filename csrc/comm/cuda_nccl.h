#pragma once

#include <memory>
#include <string>
#include <vector>

#include "comm/nccl_calls.h"

namespace dualpipe {

// The NCCL that torch has loaded, for communicators on one GPU of this process. Throws UserError if
// the process has loaded two: they would compete for the same devices, and which one a call reaches
// is a matter of chance.
[[nodiscard]] std::shared_ptr<NcclCalls> nccl_calls(int device);

// Throws what nccl_calls() does.
void require_one_nccl();

// "2.30.7", of the library that is loaded.
[[nodiscard]] std::string nccl_version();

// The files of all NCCLs in this process.
[[nodiscard]] std::vector<std::string> loaded_nccls();

}  // namespace dualpipe
