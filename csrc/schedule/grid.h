#pragma once

#include <string>
#include <vector>

#include "schedule/schedule.h"

namespace dualpipe {

// The part of a schedule to draw: ranks and steps as half-open ranges, and marks.
struct GridWindow {
  int first_rank = 0;
  int last_rank = 0;
  int first_step = 0;
  int last_step = 0;
  std::vector<int> marked_steps;  // by rank; -1 or past the end: none. Drawn as ">3F12<"
};

[[nodiscard]] GridWindow whole(const Schedule& schedule);

// A few ranks and steps around one place, which is marked; step -1: the beginning, no mark.
[[nodiscard]] GridWindow around(const Schedule& schedule, Rank rank, int step);

// The same with every rank's own position marked: for errors that say where each rank is.
[[nodiscard]] GridWindow around(const Schedule& schedule, Rank rank, std::vector<int> positions);

// A line for each rank and a column for each step, in fixed-width text that ends in a newline.
[[nodiscard]] std::string to_grid(const Schedule& schedule, const GridWindow& window);

}  // namespace dualpipe
