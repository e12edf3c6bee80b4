#pragma once

#include <memory>
#include <thread>

#include "comm/device_link.h"
#include "comm/nccl_calls.h"

namespace dualpipe {

// A link over NCCL: one communicator of two for each way.
//
// The communicators are blocking. Non-blocking ones hand every group to a new thread, which costs
// more than the message's share of a step; with a blocking one, once the first byte has gone
// through, a group is just a launch. Only connecting may wait for a peer: a separate thread does
// that, and is left behind in NCCL if the peer never comes.
class NcclLink final : public DeviceLink {
 public:
  NcclLink(std::shared_ptr<NcclCalls> calls, std::shared_ptr<Device> device, Rank rank,
           NcclOptions options);
  ~NcclLink() override;
  NcclLink(const NcclLink&) = delete;
  NcclLink& operator=(const NcclLink&) = delete;

  [[nodiscard]] Invitation invite() override;
  void connect(std::vector<DeviceWay> ways, const std::vector<Invitation>& invitations,
               Clock::duration timeout) override;
  [[nodiscard]] EventPtr transfer(Index way, const std::vector<Piece>& pieces,
                                  const EventPtr& ready) override;
  [[nodiscard]] std::shared_ptr<Allocator> allocator() override;
  [[nodiscard]] std::optional<std::string> error(Index way, bool is_busy) override;
  void abort() noexcept override;
  void drain() override;

 private:
  class State;
  const std::shared_ptr<State> state_;  // shared with the thread that connects
  std::thread connecting_;
};

}  // namespace dualpipe
