#include "schedule/planners/builtin.h"
#include "schedule/planners/sizes.h"

namespace dualpipe::planning {
namespace {

constexpr std::string_view kName = "interleaved_1f1b";

// Micro-batches go through a rank in rounds: one round through each of its stages in turn.
struct Rounds {
  int num_ranks;
  int num_microbatches;
  int stages_per_rank;
  int per_round;

  // The k-th forward of a rank; the k-th backward visits the stages in reverse.
  [[nodiscard]] Action step(Op op, int rank, int k) const {
    const int turn = (k / per_round) % stages_per_rank;
    const int local = op == Op::kForward ? turn : stages_per_rank - 1 - turn;
    const int round = k / (per_round * stages_per_rank);
    return Action(op, Stage(local * num_ranks + rank),
                  Microbatch(round * per_round + k % per_round));
  }
};

// Warm-up: the forwards of all but the last stage of the first round, and two more for each hop
// to the last rank; then one forward and one backward in turn.
std::vector<Action> row_of(const Rounds& rounds, int rank) {
  const int total = rounds.stages_per_rank * rounds.num_microbatches;
  const int warm_up = std::min(
      total, (rounds.stages_per_rank - 1) * rounds.per_round + 2 * (rounds.num_ranks - 1 - rank));
  std::vector<Action> row;
  for (int i = 0; i < total + warm_up; ++i) {
    if (i < total) row.push_back(rounds.step(Op::kForward, rank, i));
    if (i >= warm_up) row.push_back(rounds.step(Op::kBackward, rank, i - warm_up));
  }
  return row;
}

}  // namespace

// Interleaved 1F1B (arXiv 2104.04473, section 2.2), with rounds of any size that divides the
// micro-batches, not only of num_ranks.
Schedule interleaved_1f1b(const PlanRequest& request) {
  const int p = request.num_ranks;
  const int n = request.num_microbatches;
  const int stages = request.stages_per_rank == 0 ? 2 : request.stages_per_rank;
  constexpr int kMaxStagesPerRank = 64;
  require(stages >= 1 && stages <= kMaxStagesPerRank, kName, "stages_per_rank", stages,
          cat("it must be in 1..", kMaxStagesPerRank));
  require_basics(kName, request, stages);
  const int num_rounds = std::max(1, n / p);
  require(n % num_rounds == 0, kName, "num_microbatches", n,
          cat("it must be a multiple of the number of rounds, num_microbatches / num_ranks = ",
              num_rounds, ": use ", p * num_rounds, " or ", p * (num_rounds + 1)));
  Schedule schedule = start(kName, Placement(PlacementKind::kLoop, p, p * stages, n));
  const Rounds rounds{p, n, stages, n / num_rounds};
  for (int r = 0; r < p; ++r) schedule.rows[static_cast<std::size_t>(r)] = row_of(rounds, r);
  return schedule;
}

}  // namespace dualpipe::planning
