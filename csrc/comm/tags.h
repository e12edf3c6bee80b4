#pragma once

#include <cstdint>

#include "comm/transport.h"

namespace dualpipe {

// What a tag of a framed transport says is on its way. Frames and bodies have one for each kind.
enum class Traffic : std::uint32_t {
  kFrame = 0,
  kBody = 4,
  kGreeting = 8,
  kCommit = 9,
  kAgree = 10
};
static_assert(kNumMessageKinds == 4);

// Makes the tags of one pipeline: 31 bits, as many as c10d has. From the top: 1, which small tags
// of others have not; 8 bits of the pipeline's instance; 10 of the epoch; 4 of what travels; 8 of a
// number. An operation left over from a failed step would have to wait 1024 more failures for a tag
// that is its own again.
class TagMaker {
 public:
  explicit TagMaker(std::uint32_t instance) : instance_(instance) {}

  [[nodiscard]] std::uint32_t operator()(std::uint32_t epoch, Traffic traffic,
                                         MessageKind kind = MessageKind::kActivation,
                                         std::size_t number = 0) const {
    const auto lane = static_cast<std::uint32_t>(traffic) + static_cast<std::uint32_t>(kind);
    return 1u << 30 | (instance_ & 0xff) << 22 | (epoch & 0x3ff) << 12 | lane << 8 |
           (static_cast<std::uint32_t>(number) & 0xff);
  }

 private:
  std::uint32_t instance_;
};

}  // namespace dualpipe
