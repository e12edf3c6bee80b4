#pragma once

#include <string>
#include <vector>

#include "comm/device_link.h"
#include "comm/transport.h"

namespace dualpipe {

// The ways of one rank over a link, in the same order for both ranks of a pair.
class DeviceWays {
 public:
  DeviceWays(Rank rank, std::vector<MessageWay> ways);

  [[nodiscard]] std::size_t size() const { return ways_.size(); }
  [[nodiscard]] const MessageWay& operator[](std::size_t index) const { return ways_[index]; }
  [[nodiscard]] std::optional<std::size_t> find(Rank peer, MessageKind kind, bool outgoing) const;

  // For DeviceLink::connect(), in the order of named(). The lower rank of each pair makes the
  // invitations and sends them through the host transport, within a step. Blocks for the peers.
  [[nodiscard]] std::vector<Invitation> exchange_invitations(DeviceLink& link,
                                                             HostTransport& host) const;
  [[nodiscard]] std::vector<DeviceWay> named() const;

 private:
  [[nodiscard]] std::string name_of(const MessageWay& way) const;

  const Rank rank_;
  std::vector<MessageWay> ways_;
};

}  // namespace dualpipe
