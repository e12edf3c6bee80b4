#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "common/ids.h"

namespace dualpipe {

enum class PlacementKind : std::uint8_t {
  kLoop,           // stage s on rank s mod P: one stage a rank is the linear pipeline
  kV,              // two stages a rank: r and 2P-1-r
  kBidirectional,  // two stages a rank: stage s on rank s (down), on rank P-1-s (up)
};

[[nodiscard]] std::string_view to_string(PlacementKind kind);

// Which rank runs a stage for a micro-batch. A value; cheap to copy.
class Placement {
 public:
  Placement(PlacementKind kind, int num_ranks, int num_stages, int num_microbatches);

  [[nodiscard]] PlacementKind kind() const { return kind_; }
  [[nodiscard]] int num_ranks() const { return num_ranks_; }
  [[nodiscard]] int num_stages() const { return num_stages_; }
  [[nodiscard]] int num_microbatches() const { return num_microbatches_; }

  // Bidirectional: micro-batches [0, N/2) go down, [N/2, N) go up. Elsewhere all go down.
  [[nodiscard]] Direction direction_of(Microbatch microbatch) const;
  [[nodiscard]] Rank rank_of(Stage stage, Microbatch microbatch) const;

  // The stages whose parameters a rank holds, in the order in which its modules are given.
  [[nodiscard]] std::vector<Stage> stages_of(Rank rank) const;

  // The rank that holds the other copy of this rank's stages; invalid where stages have one copy.
  [[nodiscard]] Rank mirror_of(Rank rank) const;

  [[nodiscard]] Stage first_stage() const { return Stage(0); }
  [[nodiscard]] Stage last_stage() const { return Stage(num_stages_ - 1); }

  bool operator==(const Placement&) const = default;

 private:
  PlacementKind kind_;
  int num_ranks_;
  int num_stages_;
  int num_microbatches_;
};

}  // namespace dualpipe
