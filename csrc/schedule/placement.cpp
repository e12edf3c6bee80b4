#include "schedule/placement.h"

#include <limits>

#include "common/error.h"

namespace dualpipe {
namespace {

constexpr int kMaxStages = std::numeric_limits<std::uint16_t>::max();

void require(bool holds, const std::string& text) {
  if (!holds) throw ScheduleError(text);
}

}  // namespace

std::string_view to_string(PlacementKind kind) {
  switch (kind) {
    case PlacementKind::kLoop:
      return "loop";
    case PlacementKind::kV:
      return "v";
    case PlacementKind::kBidirectional:
      return "bidirectional";
  }
  throw InternalError(cat("unknown placement kind ", static_cast<int>(kind)));
}

PlacementKind parse_placement_kind(std::string_view text) {
  for (auto kind : {PlacementKind::kLoop, PlacementKind::kV, PlacementKind::kBidirectional}) {
    if (text == to_string(kind)) return kind;
  }
  throw ScheduleError(
      cat("placement is \"", text, "\"; use one of \"loop\", \"v\", \"bidirectional\""));
}

Placement::Placement(PlacementKind kind, int num_ranks, int num_stages, int num_microbatches)
    : kind_(kind),
      num_ranks_(num_ranks),
      num_stages_(num_stages),
      num_microbatches_(num_microbatches) {
  require(num_ranks >= 1, cat("num_ranks is ", num_ranks, "; it must be at least 1"));
  require(num_microbatches >= 1,
          cat("num_microbatches is ", num_microbatches, "; it must be at least 1"));
  require(num_stages >= 1 && num_stages <= kMaxStages,
          cat("num_stages is ", num_stages, "; it must be in 1..", kMaxStages));
  if (kind == PlacementKind::kLoop) {
    require(num_stages % num_ranks == 0,
            cat("num_stages is ", num_stages,
                "; a loop placement needs a multiple of num_ranks = ", num_ranks));
  } else if (kind == PlacementKind::kV) {
    require(num_stages == 2 * num_ranks,
            cat("num_stages is ", num_stages, "; a V placement needs two a rank: ", 2 * num_ranks));
  } else {
    require(num_ranks % 2 == 0,
            cat("num_ranks is ", num_ranks,
                "; a bidirectional placement needs an even number: use ", num_ranks + 1));
    require(num_stages == num_ranks,
            cat("num_stages is ", num_stages,
                "; a bidirectional placement needs as many stages as ranks: ", num_ranks));
    require(
        num_microbatches % 2 == 0,
        cat("num_microbatches is ", num_microbatches,
            "; a bidirectional placement sends half of them each way: use ", num_microbatches + 1));
  }
}

std::vector<Stage> Placement::stages_of(Rank rank) const {
  const int r = rank.value();
  if (kind_ != PlacementKind::kLoop) return {Stage(r), Stage(num_stages_ - 1 - r)};
  std::vector<Stage> stages;
  for (int stage = r; stage < num_stages_; stage += num_ranks_) stages.emplace_back(stage);
  return stages;
}

Rank Placement::mirror_of(Rank rank) const {
  if (kind_ != PlacementKind::kBidirectional) return {};
  return Rank(num_ranks_ - 1 - rank.value());
}

}  // namespace dualpipe
