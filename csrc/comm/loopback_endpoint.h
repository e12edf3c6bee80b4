#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "comm/failure_flag.h"
#include "comm/transport.h"

namespace dualpipe::loopback {

class Hub;

// One rank's end. Its counters are the rank's own; what other ranks use is in the hub, except for
// fail() and epoch().
class Endpoint final : public HostTransport {
 public:
  Endpoint(std::shared_ptr<Hub> hub, Rank rank);
  ~Endpoint() override;

  void begin_step(const StepInfo& info) override;
  EventPtr send(Rank to, const MessageId& id, Message message, const EventPtr& ready) override;
  std::unique_ptr<PendingReceive> receive(Rank from, const MessageId& id) override;
  void end_step() override;
  void abort(const Failure& failure) noexcept override;
  void recover() override;
  Extremes agree(std::uint64_t value) override;
  void throw_if_failed() const override { failure_.throw_if_set(); }

  [[nodiscard]] Message take(Rank from, const MessageId& id, std::uint64_t number);
  void fail(FailureFlag::Kind kind, const std::string& text);
  [[nodiscard]] std::uint64_t epoch() const { return epoch_.load(std::memory_order_acquire); }

 private:
  const std::shared_ptr<Hub> hub_;
  const Rank rank_;
  FailureFlag failure_;
  std::atomic<std::uint64_t> epoch_{0};
  std::uint64_t num_steps_ = 0;     // in this epoch
  std::uint64_t num_meetings_ = 0;  // in this step
  std::atomic<bool> in_step_{false};
  std::vector<std::array<std::uint64_t, kNumMessageKinds>> num_received_;  // by source
};

}  // namespace dualpipe::loopback
