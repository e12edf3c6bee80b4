#include "common/error.h"
#include "schedule/channel.h"
#include "schedule/verify/progress.h"
#include "schedule/verify/worklist.h"

namespace dualpipe {
namespace {

class ComputeRun {
 public:
  explicit ComputeRun(const Schedule& schedule)
      : schedule_(schedule),
        placement_(schedule.placement),
        made_(num_messages(placement_), 0),
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
        if (!input || made_[message_index(placement_, *input)]) return;
        const Channel channel = channel_of(placement_, *input);
        findings.add(Rank(static_cast<int>(rank)), next_[rank],
                     cat(to_string(part), " waits for rank ", channel.source,
                         ", which never gets that far: the order of computation has a cycle"));
      });
    }
  }

 private:
  void advance(Rank rank) {
    const auto& row = schedule_.row(rank);
    std::size_t& next = next_[rank.index()];
    while (next < row.size() && ready(row[next])) finish(row[next++]);
  }

  [[nodiscard]] bool ready(const Action& action) const {
    bool all = true;
    for_each_part(action, [&](const Action& part) {
      const auto input = input_of(placement_, part);
      if (input && !made_[message_index(placement_, *input)]) all = false;
    });
    return all;
  }

  void finish(const Action& action) {
    for_each_part(action, [&](const Action& part) {
      const auto output = output_of(placement_, part);
      if (!output) return;
      made_[message_index(placement_, *output)] = 1;
      worklist_.push(channel_of(placement_, *output).destination);
    });
  }

  const Schedule& schedule_;
  const Placement placement_;
  std::vector<char> made_;         // by message
  std::vector<std::size_t> next_;  // by rank
  Worklist worklist_;
};

}  // namespace

void check_compute_progress(const Schedule& schedule, Findings& findings) {
  ComputeRun run(schedule);
  run.run();
  run.report(findings);
}

}  // namespace dualpipe
