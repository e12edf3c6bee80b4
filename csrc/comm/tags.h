#pragma once

#include <cstdint>

#include "comm/transport.h"

namespace dualpipe {

// What a framed transport's tag says about the message. Frames and bodies have one value for each
// MessageKind.
enum class Traffic : std::uint32_t {
  kFrame = 0,
  kBody = 4,
  kGreeting = 8,
  kCommit = 9,
  kAgree = 10
};
static_assert(kNumMessageKinds == 4);

// Makes the tags of one pipeline: 31 bits, as many as c10d has. From the top: a 1, which other
// users' small tags do not have; 8 bits of the pipeline's instance; 10 of the epoch; 4 of the
// traffic; 8 of a number. An operation left over from a failed step meets its own tag again only
// after 1024 more failures.
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
