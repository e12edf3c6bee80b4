#include "comm/device_ways.h"

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>

#include "comm/bytes.h"
#include "common/error.h"

namespace dualpipe {
namespace {

const char* plural_of(MessageKind kind) {
  switch (kind) {
    case MessageKind::kActivation:
      return "activations";
    case MessageKind::kGradient:
      return "gradients";
    case MessageKind::kMirrorLow:
      return "mirrored tensors of the lower stage";
    case MessageKind::kMirrorHigh:
      return "mirrored tensors of the upper stage";
  }
  return "messages";
}

}  // namespace

DeviceWays::DeviceWays(Rank rank, std::vector<MessageWay> ways)
    : rank_(rank), ways_(std::move(ways)) {
  std::sort(ways_.begin(), ways_.end(), [rank](const MessageWay& a, const MessageWay& b) {
    const auto order = [rank](const MessageWay& way) {
      return std::tuple(way.peer, way.outgoing == (rank < way.peer), way.kind);
    };
    return order(a) < order(b);
  });
}

std::optional<std::size_t> DeviceWays::find(Rank peer, MessageKind kind, bool outgoing) const {
  const auto found = std::find(ways_.begin(), ways_.end(), MessageWay{peer, kind, outgoing});
  if (found == ways_.end()) return std::nullopt;
  return static_cast<std::size_t>(found - ways_.begin());
}

std::vector<DeviceWay> DeviceWays::named() const {
  std::vector<DeviceWay> named;
  for (const MessageWay& way : ways_) named.push_back({way.peer, way.outgoing, name_of(way)});
  return named;
}

std::string DeviceWays::name_of(const MessageWay& way) const {
  const auto [from, to] = way.outgoing ? std::pair(rank_, way.peer) : std::pair(way.peer, rank_);
  return cat(plural_of(way.kind), " from rank ", from, " to rank ", to);
}

std::vector<Invitation> DeviceWays::exchange_invitations(DeviceLink& link,
                                                         HostTransport& host) const {
  std::map<Rank, std::vector<Invitation>> by_peer;
  for (const MessageWay& way : ways_) by_peer[way.peer].emplace_back();
  const MessageId id{MessageKind::kActivation, Stage(0), Microbatch(0)};
  for (auto& [peer, invitations] : by_peer) {
    if (peer < rank_) continue;
    std::generate(invitations.begin(), invitations.end(), [&link] { return link.invite(); });
    (void)host.send(peer, id,
                    bytes_message(invitations.data(), invitations.size() * sizeof(Invitation)),
                    nullptr);
  }
  std::vector<Invitation> all;
  for (auto& [peer, invitations] : by_peer) {
    if (peer < rank_) {
      const Message theirs = host.receive(peer, id)->wait().message;
      read_bytes(theirs, invitations.data(), invitations.size() * sizeof(Invitation));
    }
    all.insert(all.end(), invitations.begin(), invitations.end());
  }
  return all;
}

}  // namespace dualpipe
