#pragma once

#include <gtest/gtest.h>

#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "schedule/passes/passes.h"
#include "schedule/planners/planners.h"
#include "schedule/verify/verify.h"

namespace dualpipe::test {

// A schedule from a text for each rank, actions separated by spaces.
inline Schedule make(PlacementKind kind, int num_stages, std::initializer_list<const char*> rows) {
  std::string csv;
  for (std::string row : rows) {
    for (char& character : row) {
      if (character == ' ') character = ',';
    }
    csv += row + '\n';
  }
  return schedule_from_csv(csv, kind, num_stages);
}

// A rank's row in the same form.
inline std::string text_of(const Schedule& schedule, int rank) {
  std::string out;
  for (const Action& action : schedule.row(Rank(rank))) {
    if (!out.empty()) out += ' ';
    append_to(out, action);
  }
  return out;
}

inline std::vector<Action>& row_of(Schedule& schedule, int rank) {
  return schedule.rows[static_cast<std::size_t>(rank)];
}

inline std::size_t find(const Schedule& schedule, int rank, std::string_view action) {
  const auto& row = schedule.row(Rank(rank));
  for (std::size_t step = 0; step < row.size(); ++step) {
    if (to_string(row[step]) == action) return step;
  }
  ADD_FAILURE() << action << " is not on rank " << rank;
  return 0;
}

inline std::string joined(const std::vector<Diagnostic>& diagnostics) {
  std::string out;
  for (const Diagnostic& found : diagnostics) {
    out += cat("rank ", found.rank, " step ", found.step, ": ", found.text, "\n");
  }
  return out;
}

// Runs call, which must throw Error with every one of parts in its text.
template <typename Error, typename Call>
void expect_error(Call&& call, std::initializer_list<const char*> parts) {
  try {
    call();
  } catch (const Error& error) {
    for (const char* part : parts) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos)
          << "no \"" << part << "\" in: " << error.what();
    }
    return;
  }
  ADD_FAILURE() << "nothing was thrown";
}

// Visits the plans of every planner for all sizes up to max_ranks and some micro-batch counts.
template <typename Visit>
void for_each_plan(int max_ranks, Visit&& visit) {
  int visited = 0;
  for (const PlannerInfo& info : planners()) {
    for (int p = 1; p <= max_ranks; ++p) {
      for (int n : {1, 2, 3, 2 * p - 1, 2 * p, 2 * p + 1, 2 * p + 2, 20, 32, 33}) {
        for (int stages : {0, 1, 3}) {
          try {
            visit(info.plan({p, n, stages}));
            ++visited;
          } catch (const ScheduleError&) {
            continue;  // a size that the planner does not serve
          }
          if (::testing::Test::HasFailure()) return;
        }
      }
    }
  }
  EXPECT_GT(visited, 100);
}

}  // namespace dualpipe::test
