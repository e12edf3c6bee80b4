#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "comm/transport.h"

namespace dualpipe::conformance {

// Makes one transport per rank, for ranks that are threads of this process.
using Factory = std::function<std::vector<std::unique_ptr<Transport>>(int num_ranks)>;

// What every transport must do. Each check makes its own transports and uses gtest's assertions.
struct Check {
  std::string name;
  void (*run)(const Factory& factory);
};
[[nodiscard]] const std::vector<Check>& checks();

}  // namespace dualpipe::conformance
