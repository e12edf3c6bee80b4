#include "schedule/grid.h"

#include <algorithm>

#include "common/error.h"

namespace dualpipe {
namespace {

constexpr int kRanksAround = 3;
constexpr int kStepsAround = 4;

int longest_row(const Schedule& schedule) {
  std::size_t longest = 0;
  for (const auto& row : schedule.rows) longest = std::max(longest, row.size());
  return static_cast<int>(longest);
}

int num_rows(const Schedule& schedule) { return static_cast<int>(schedule.rows.size()); }

class Grid {
 public:
  Grid(const Schedule& schedule, const GridWindow& window) : schedule_(schedule), window_(window) {
    for (int step = window.first_step; step < window.last_step; ++step) {
      std::size_t width = std::to_string(step).size();
      for (int rank = window.first_rank; rank < window.last_rank; ++rank) {
        width = std::max(width, cell(rank, step).size());
      }
      widths_.push_back(width);
    }
    label_width_ = cat("rank ", std::max(window.last_rank - 1, 0)).size();
  }

  [[nodiscard]] std::string draw() const {
    std::string out = line("step", [](int step) { return std::to_string(step); });
    for (int rank = window_.first_rank; rank < window_.last_rank; ++rank) {
      out += line(cat("rank ", rank), [&](int step) { return cell(rank, step); });
    }
    return out;
  }

 private:
  template <typename Cell>
  [[nodiscard]] std::string line(std::string text, Cell&& cell_at) const {
    text.resize(std::max(label_width_, text.size()), ' ');
    text += " |";
    for (int step = window_.first_step; step < window_.last_step; ++step) {
      const std::string cell_text = cell_at(step);
      text += ' ';
      text += cell_text;
      const auto column = static_cast<std::size_t>(step - window_.first_step);
      text.append(widths_[column] - cell_text.size(), ' ');
    }
    text.erase(text.find_last_not_of(' ') + 1);
    return text + '\n';
  }

  [[nodiscard]] std::string cell(int rank, int step) const {
    const auto& row = schedule_.rows[static_cast<std::size_t>(rank)];
    if (step >= static_cast<int>(row.size())) return {};
    const Action& action = row[static_cast<std::size_t>(step)];
    std::string text = action.op() == Op::kOverlap ? cat(to_string(action.forward_half()), "&",
                                                         to_string(action.backward_half()))
                                                   : to_string(action);
    return marked(rank, step) ? cat(">", text, "<") : text;
  }

  [[nodiscard]] bool marked(int rank, int step) const {
    const auto index = static_cast<std::size_t>(rank);
    return index < window_.marked_steps.size() && window_.marked_steps[index] == step;
  }

  const Schedule& schedule_;
  const GridWindow& window_;
  std::vector<std::size_t> widths_;  // by column of the window
  std::size_t label_width_ = 0;
};

}  // namespace

GridWindow whole(const Schedule& schedule) {
  return {0, num_rows(schedule), 0, longest_row(schedule), {}};
}

GridWindow around(const Schedule& schedule, Rank rank, int step) {
  std::vector<int> positions(schedule.rows.size(), -1);
  positions[rank.index()] = step;
  return around(schedule, rank, std::move(positions));
}

GridWindow around(const Schedule& schedule, Rank rank, std::vector<int> positions) {
  const int r = rank.value();
  const int step = std::max(positions[rank.index()], 0);
  return {std::max(r - kRanksAround, 0), std::min(r + kRanksAround + 1, num_rows(schedule)),
          std::max(step - kStepsAround, 0),
          std::min(step + kStepsAround + 1, longest_row(schedule)), std::move(positions)};
}

std::string to_grid(const Schedule& schedule, const GridWindow& window) {
  return Grid(schedule, window).draw();
}

}  // namespace dualpipe
