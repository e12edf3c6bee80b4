#include "common/error.h"
#include "schedule/channel.h"
#include "schedule/verify/progress.h"

namespace dualpipe {

void check_channel_order(const Schedule& lowered, Findings& findings) {
  const Placement& placement = lowered.placement;
  std::vector<std::vector<Transfer>> sent(num_channels(placement));
  for (const auto& row : lowered.rows) {
    for (const Action& action : row) {
      if (!is_send(action.op())) continue;
      const Transfer message = *output_of(placement, action);
      sent[channel_index(placement, channel_of(placement, message))].push_back(message);
    }
  }
  std::vector<std::size_t> received(num_channels(placement), 0);
  for (std::size_t rank = 0; rank < lowered.rows.size(); ++rank) {
    for (std::size_t step = 0; step < lowered.rows[rank].size(); ++step) {
      const Action& action = lowered.rows[rank][step];
      if (!is_recv(action.op())) continue;
      const Transfer message = *input_of(placement, action);
      const Channel channel = channel_of(placement, message);
      const std::size_t index = channel_index(placement, channel);
      const Transfer& expected = sent[index][received[index]++];
      if (expected == message) continue;
      findings.add(
          Rank(static_cast<int>(rank)), step,
          cat(to_string(action), " is number ", received[index] - 1, " in its channel, but rank ",
              channel.source, " sends ", to_string(send_action(expected)), " there"));
    }
  }
}

}  // namespace dualpipe
