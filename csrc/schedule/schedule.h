#pragma once

#include <iosfwd>
#include <string>
#include <string_view>
#include <vector>

#include "schedule/action.h"
#include "schedule/placement.h"

namespace dualpipe {

// What every rank does, in order, as data. Planners produce only compute actions; passes
// (schedule/passes/) add explicit sends, receives and reductions.
struct Schedule {
  std::string name;
  Placement placement;
  std::vector<std::vector<Action>> rows;  // by rank

  [[nodiscard]] int num_ranks() const { return placement.num_ranks(); }
  [[nodiscard]] int num_stages() const { return placement.num_stages(); }
  [[nodiscard]] int num_microbatches() const { return placement.num_microbatches(); }
  [[nodiscard]] const std::vector<Action>& row(Rank rank) const { return rows[rank.index()]; }

  // The name is not compared: for a schedule from a CSV file it is the file's.
  bool operator==(const Schedule& other) const {
    return placement == other.placement && rows == other.rows;
  }
};

// One line per rank, cells separated by commas, empty cells allowed: the CSV of
// torch.distributed.pipelining.
[[nodiscard]] std::string to_csv(const Schedule& schedule);

// num_microbatches is taken from the text. A malformed line throws ScheduleError with line and
// column (both from 1). kind and num_stages say where stages live: the text does not.
[[nodiscard]] Schedule schedule_from_csv(std::string_view text, PlacementKind kind, int num_stages);

// A stable 64-bit digest of everything in the schedule but its name: the same on every machine.
[[nodiscard]] std::uint64_t digest(const Schedule& schedule);
[[nodiscard]] std::uint64_t text_digest(std::string_view text);

}  // namespace dualpipe
