#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "common/ids.h"

namespace dualpipe {

enum class PlacementKind : std::uint8_t {
  kLoop,           // stage s on rank s mod P: linear if there is one stage per rank
  kV,              // two stages per rank: r and 2P-1-r
  kBidirectional,  // two stages per rank: stage s on rank s (down), on rank P-1-s (up)
};

// "loop", "v", "bidirectional".
[[nodiscard]] std::string_view to_string(PlacementKind kind);
// The inverse; throws ScheduleError with the known names.
[[nodiscard]] PlacementKind parse_placement_kind(std::string_view text);

// Which rank runs a stage for a micro-batch. A value; cheap to copy.
class Placement {
 public:
  // Throws ScheduleError on impossible sizes: a V needs two stages per rank, a bidirectional
  // placement an even number of ranks, as many stages as ranks, and an even number of
  // micro-batches.
  Placement(PlacementKind kind, int num_ranks, int num_stages, int num_microbatches);

  [[nodiscard]] PlacementKind kind() const { return kind_; }
  [[nodiscard]] int num_ranks() const { return num_ranks_; }
  [[nodiscard]] int num_stages() const { return num_stages_; }
  [[nodiscard]] int num_microbatches() const { return num_microbatches_; }

  // Bidirectional: micro-batches [0, N/2) go down, [N/2, N) go up. Elsewhere all go down.
  [[nodiscard]] Direction direction_of(Microbatch microbatch) const {
    const bool up =
        kind_ == PlacementKind::kBidirectional && microbatch.value() >= num_microbatches_ / 2;
    return up ? Direction::kUp : Direction::kDown;
  }
  [[nodiscard]] Rank rank_of(Stage stage, Microbatch microbatch) const {
    const int s = stage.value();
    switch (kind_) {
      case PlacementKind::kV:
        return Rank(s < num_ranks_ ? s : num_stages_ - 1 - s);
      case PlacementKind::kBidirectional:
        return Rank(direction_of(microbatch) == Direction::kDown ? s : num_ranks_ - 1 - s);
      case PlacementKind::kLoop:
        break;
    }
    return Rank(s < num_ranks_ ? s : s % num_ranks_);
  }

  // The stages whose parameters a rank holds, in the order in which its modules are given.
  [[nodiscard]] std::vector<Stage> stages_of(Rank rank) const;

  // The rank that holds the other copy of this rank's stages; invalid where stages have one copy.
  [[nodiscard]] Rank mirror_of(Rank rank) const;

  [[nodiscard]] Stage first_stage() const { return Stage(0); }
  [[nodiscard]] Stage last_stage() const { return Stage(num_stages_ - 1); }

  // A dense number for a (stage, micro-batch) of the schedule: an index into flat tables.
  [[nodiscard]] std::size_t cell(Stage stage, Microbatch microbatch) const {
    return stage.index() * static_cast<std::size_t>(num_microbatches_) + microbatch.index();
  }
  [[nodiscard]] std::size_t num_cells() const {
    return static_cast<std::size_t>(num_stages_) * static_cast<std::size_t>(num_microbatches_);
  }

  bool operator==(const Placement&) const = default;

 private:
  PlacementKind kind_;
  int num_ranks_;
  int num_stages_;
  int num_microbatches_;
};

}  // namespace dualpipe
