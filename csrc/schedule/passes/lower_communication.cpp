#include <algorithm>
#include <limits>

#include "common/error.h"
#include "schedule/channel.h"
#include "schedule/passes/passes.h"

namespace dualpipe {
namespace {

constexpr std::int32_t kUnused = -1;

// A receive, the compute action before which it is posted, and the first compute action that needs
// it or a later receive of its channel.
struct Receive {
  Action action;
  std::int32_t slot;
  std::int32_t use;
};

bool posted_earlier(const Receive& a, const Receive& b) {
  return a.slot != b.slot ? a.slot < b.slot : a.use < b.use;
}

bool crosses(const Channel& channel) { return channel.source != channel.destination; }

class Lowering {
 public:
  Lowering(const Placement& placement, int lookahead)
      : placement_(placement),
        lookahead_(lookahead),
        sent_(num_channels(placement)),
        use_of_(num_messages(placement), kUnused) {}

  void read(const std::vector<std::vector<Action>>& rows) {
    for (std::size_t rank = 0; rank < rows.size(); ++rank) read_row(rows[rank]);
  }

  // Rows may be replaced one by one: read() has taken all that is needed from the others.
  [[nodiscard]] std::vector<Action> lowered(const std::vector<Action>& row, Rank rank) {
    const std::vector<Receive> receives = receives_of(rank);
    std::vector<Action> out;
    out.reserve(row.size() * 2 + receives.size());
    auto next = receives.begin();
    std::int32_t step = 0;
    for (const Action& action : row) {
      if (is_compute(action.op())) {
        for (; next != receives.end() && next->slot <= step; ++next) out.push_back(next->action);
        ++step;
      }
      out.push_back(action);
      append_sends(out, action);
    }
    return out;
  }

 private:
  // Records where each message is used, and each channel's messages in the order of their sends.
  void read_row(const std::vector<Action>& row) {
    std::int32_t step = 0;
    for (const Action& action : row) {
      if (is_send(action.op()) || is_recv(action.op())) {
        throw ScheduleError(cat("\"", to_string(action),
                                "\" in a schedule that is to be lowered; lower compute actions "
                                "alone, once"));
      }
      for_each_part(action, [&](const Action& part) {
        if (auto input = input_of(placement_, part)) {
          use_of_[message_index(placement_, *input)] = step;
        }
        if (auto output = output_of(placement_, part)) {
          const Channel channel = channel_of(placement_, *output);
          if (crosses(channel)) sent_[channel_index(placement_, channel)].push_back(*output);
        }
      });
      if (is_compute(action.op())) ++step;
    }
  }

  void append_sends(std::vector<Action>& out, const Action& action) const {
    for_each_part(action, [&](const Action& part) {
      const auto output = output_of(placement_, part);
      if (output && crosses(channel_of(placement_, *output))) out.push_back(send_action(*output));
    });
  }

  // All receives of a rank in the order in which they are posted: a merge of its channels.
  [[nodiscard]] std::vector<Receive> receives_of(Rank rank) {
    std::vector<Receive> all;
    const int num_ranks = placement_.num_ranks();
    const Rank previous((rank.value() + num_ranks - 1) % num_ranks);
    const Rank next((rank.value() + 1) % num_ranks);
    for (TransferKind kind : {TransferKind::kActivation, TransferKind::kGradient}) {
      append_channel(all, Channel{previous, rank, kind});
      if (next != previous) append_channel(all, Channel{next, rank, kind});
    }
    return all;
  }

  void append_channel(std::vector<Receive>& all, const Channel& channel) {
    std::vector<Transfer> messages = std::move(sent_[channel_index(placement_, channel)]);
    const auto middle = static_cast<std::ptrdiff_t>(all.size());
    for (const Transfer& message : messages) {
      const std::int32_t use = use_of_[message_index(placement_, message)];
      if (use == kUnused) fail_unused(message, channel);
      all.push_back({recv_action(message), 0, use});
    }
    // Keeps the order of the channel: a receive is posted no later than those after it.
    std::int32_t earliest = std::numeric_limits<std::int32_t>::max();
    for (auto it = all.rbegin(); it != all.rend() - middle; ++it) {
      earliest = std::min(earliest, it->use);
      it->use = earliest;
      it->slot = std::max(0, earliest - lookahead_);
    }
    std::inplace_merge(all.begin(), all.begin() + middle, all.end(), posted_earlier);
  }

  [[noreturn]] void fail_unused(const Transfer& message, const Channel& channel) const {
    throw ScheduleError(cat("rank ", channel.source, " makes what ",
                            to_string(recv_action(message)), " asks for, but rank ",
                            channel.destination, " never uses it; verify() names what is missing"));
  }

  Placement placement_;
  std::int32_t lookahead_;
  std::vector<std::vector<Transfer>> sent_;  // by channel
  std::vector<std::int32_t> use_of_;         // by message: step of the compute action that uses it
};

}  // namespace

Schedule lower_communication(Schedule schedule, int lookahead) {
  if (lookahead < 0) {
    throw ScheduleError(cat("lookahead is ", lookahead,
                            "; it counts compute actions: use 0 (right before the use) or more"));
  }
  Lowering lowering(schedule.placement, lookahead);
  lowering.read(schedule.rows);
  for (std::size_t rank = 0; rank < schedule.rows.size(); ++rank) {
    schedule.rows[rank] = lowering.lowered(schedule.rows[rank], Rank(static_cast<int>(rank)));
  }
  return schedule;
}

}  // namespace dualpipe
