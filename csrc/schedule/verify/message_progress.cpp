#include <algorithm>

#include "common/error.h"
#include "schedule/channel.h"
#include "schedule/verify/progress.h"
#include "schedule/verify/worklist.h"

namespace dualpipe {
namespace {

class MessageRun {
 public:
  explicit MessageRun(const Schedule& schedule)
      : schedule_(schedule),
        placement_(schedule.placement),
        place_(num_messages(placement_), -1),
        sent_(num_channels(placement_), 0),
        asked_(num_channels(placement_), 0),
        next_(schedule.rows.size(), 0),
        worklist_(placement_.num_ranks()) {}

  void run() {
    while (!worklist_.empty()) advance(worklist_.pop());
  }

  void report(Findings& findings) const {
    for (std::size_t rank = 0; rank < next_.size(); ++rank) {
      const auto& row = schedule_.rows[rank];
      if (next_[rank] == row.size()) continue;
      for_each_part(row[next_[rank]], [&](const Action& part) {
        const auto input = input_of(placement_, part);
        if (input && !arrived(*input)) {
          findings.add(Rank(static_cast<int>(rank)), next_[rank], waits(part, *input));
        }
      });
    }
  }

 private:
  void advance(Rank rank) {
    const auto& row = schedule_.row(rank);
    std::size_t& next = next_[rank.index()];
    for (; next < row.size(); ++next) {
      const Action& action = row[next];
      if (is_send(action.op())) {
        post_send(*output_of(placement_, action));
      } else if (is_recv(action.op())) {
        post_recv(*input_of(placement_, action));
      } else if (!ready(action)) {
        return;
      }
    }
  }

  // A message's place in its channel is that of its send; check_channel_order has proved that its
  // receive has the same place.
  void post_send(const Transfer& message) {
    const Channel channel = channel_of(placement_, message);
    const std::size_t index = channel_index(placement_, channel);
    place_[message_index(placement_, message)] = sent_[index]++;
    worklist_.push(channel.destination);
  }

  void post_recv(const Transfer& message) {
    ++asked_[channel_index(placement_, channel_of(placement_, message))];
  }

  [[nodiscard]] bool ready(const Action& action) const {
    bool all = true;
    for_each_part(action, [&](const Action& part) {
      const auto input = input_of(placement_, part);
      if (input && !arrived(*input)) all = false;
    });
    return all;
  }

  [[nodiscard]] bool arrived(const Transfer& message) const {
    const Channel channel = channel_of(placement_, message);
    if (channel.source == channel.destination) return true;  // RowOrder has proved it
    const std::size_t index = channel_index(placement_, channel);
    const std::int32_t place = place_[message_index(placement_, message)];
    return place >= 0 && place < std::min(sent_[index], asked_[index]);
  }

  [[nodiscard]] std::string waits(const Action& part, const Transfer& message) const {
    const Rank source = channel_of(placement_, message).source;
    const std::size_t at = next_[source.index()];
    const auto& row = schedule_.row(source);
    return cat(to_string(part), " waits for ever for ", to_string(send_action(message)),
               " of rank ", source, ", which stands at ",
               at < row.size() ? to_string(row[at]) : std::string("its end"));
  }

  const Schedule& schedule_;
  const Placement placement_;
  std::vector<std::int32_t> place_;  // by message: how many its channel sent before; -1: not sent
  std::vector<std::int32_t> sent_;   // by channel: sends posted
  std::vector<std::int32_t> asked_;  // by channel: receives posted
  std::vector<std::size_t> next_;    // by rank
  Worklist worklist_;
};

}  // namespace

void check_message_progress(const Schedule& lowered, Findings& findings) {
  MessageRun run(lowered);
  run.run();
  run.report(findings);
}

}  // namespace dualpipe
