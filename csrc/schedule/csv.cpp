#include <algorithm>

#include "common/error.h"
#include "schedule/schedule.h"

namespace dualpipe {
namespace {

struct Place {
  std::size_t line;    // from 1
  std::size_t column;  // from 1
};

[[noreturn]] void fail(Place place, const std::string& problem) {
  throw ScheduleError(cat("line ", place.line, ", column ", place.column, ": ", problem));
}

std::string_view trim(std::string_view text) {
  const auto first = text.find_first_not_of(" \t");
  if (first == std::string_view::npos) return text.substr(text.size());
  return text.substr(first, text.find_last_not_of(" \t") - first + 1);
}

// Turns columns within the cell into columns of the line.
Action parse_cell(std::string_view cell, Place place) {
  try {
    return parse_action(cell);
  } catch (const ActionSyntaxError& error) {
    fail({place.line, place.column + error.column() - 1}, error.problem());
  }
}

void check_stages(const Action& action, int num_stages, Place place) {
  for_each_part(action, [&](const Action& part) {
    if (part.stage().value() < num_stages) return;
    fail(place, cat("stage ", part.stage(), " in \"", to_string(action),
                    "\"; with num_stages = ", num_stages, " stages are 0..", num_stages - 1));
  });
}

std::vector<Action> parse_line(std::string_view line, std::size_t line_number, int num_stages) {
  std::vector<Action> row;
  for (std::size_t start = 0; start <= line.size();) {
    const std::size_t end = std::min(line.find(',', start), line.size());
    const std::string_view cell = trim(line.substr(start, end - start));
    if (!cell.empty()) {
      const Place place{line_number, static_cast<std::size_t>(cell.data() - line.data()) + 1};
      row.push_back(parse_cell(cell, place));
      check_stages(row.back(), num_stages, place);
    }
    start = end + 1;
  }
  if (row.empty()) {
    fail({line_number, 1}, cat("rank ", line_number - 1, " has no actions; each line is one rank"));
  }
  return row;
}

std::vector<std::string_view> split_lines(std::string_view text) {
  std::vector<std::string_view> lines;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    std::string_view line = text.substr(0, end);
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    lines.push_back(line);
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  while (!lines.empty() && trim(lines.back()).empty()) lines.pop_back();
  return lines;
}

int count_microbatches(const std::vector<std::vector<Action>>& rows) {
  int highest = -1;
  for (const auto& row : rows) {
    for (const Action& action : row) {
      for_each_part(action, [&](const Action& part) {
        highest = std::max(highest, part.microbatch().value());
      });
    }
  }
  if (highest < 0) throw ScheduleError("the schedule computes nothing; add actions such as 0F0");
  return highest + 1;
}

}  // namespace

std::string to_csv(const Schedule& schedule) {
  std::string out;
  for (const auto& row : schedule.rows) {
    for (std::size_t i = 0; i < row.size(); ++i) {
      if (i > 0) out += ',';
      append_to(out, row[i]);
    }
    out += '\n';
  }
  return out;
}

Schedule schedule_from_csv(std::string_view text, PlacementKind kind, int num_stages) {
  std::vector<std::vector<Action>> rows;
  for (std::string_view line : split_lines(text)) {
    rows.push_back(parse_line(line, rows.size() + 1, num_stages));
  }
  if (rows.empty()) throw ScheduleError("the schedule is empty; write one line for each rank");
  const Placement placement(kind, static_cast<int>(rows.size()), num_stages,
                            count_microbatches(rows));
  return Schedule{"csv", placement, std::move(rows)};
}

}  // namespace dualpipe
