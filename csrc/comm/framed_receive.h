#pragma once

#include <cstdint>

#include "comm/frame.h"
#include "comm/lane.h"
#include "comm/link_session.h"
#include "comm/tags.h"

namespace dualpipe {

// A requested frame. wait() must be called within its step.
class FramedReceive final : public PendingReceive {
 public:
  // What all receives of one step share. Must live as long as they are used.
  struct Step {
    LinkSession& session;
    TagMaker tags;
    std::uint32_t epoch = 0;
    std::int64_t number = 0;
  };

  FramedReceive(const Step& step, Rank from, const MessageId& id, Lane& lane);
  [[nodiscard]] Arrival wait() override;

 private:
  [[nodiscard]] std::shared_ptr<Buffer> await(Operations::Handle handle) const;
  void check(const FrameHeader& header) const;

  const Step& step_;
  const std::uint32_t epoch_;
  const Rank from_;
  const MessageId id_;
  Lane& lane_;
  const Lane::Place place_;
  const Operations::Handle handle_;
};

}  // namespace dualpipe
