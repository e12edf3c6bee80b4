#include <algorithm>
#include <cmath>

#include "common/error.h"
#include "schedule/sim/simulate.h"

namespace dualpipe {
namespace {

constexpr double kMaxColumns = 100'000;

enum class Style : std::uint8_t { kFull, kMicrobatch, kLetter };

std::string label(const Action& action, Style style) {
  std::string text;
  for_each_part(action, [&](const Action& part) {
    if (!text.empty()) text += '&';
    std::string own = to_string(part);
    if (style != Style::kFull) own.erase(0, own.find_first_not_of("0123456789"));
    if (style == Style::kLetter) own.resize(1);
    text += own;
  });
  return text;
}

class Drawing {
 public:
  Drawing(const Timeline& timeline, double unit) : timeline_(timeline), unit_(unit) {
    for (Style style : {Style::kFull, Style::kMicrobatch}) {
      style_ = style;
      if (all_fit()) return;
    }
    style_ = Style::kLetter;
  }

  [[nodiscard]] std::string draw() const {
    std::string out;
    const std::size_t digits = std::to_string(timeline_.ranks.size() - 1).size();
    for (std::size_t rank = 0; rank < timeline_.ranks.size(); ++rank) {
      std::string number = std::to_string(rank);
      number.resize(digits, ' ');
      out += cat("rank ", number, " |", line(timeline_.ranks[rank]), "|\n");
    }
    return out;
  }

 private:
  [[nodiscard]] std::size_t column(double time) const {
    return static_cast<std::size_t>(std::lround(time / unit_));
  }

  // One character is kept for the gap to the next action.
  [[nodiscard]] bool all_fit() const {
    for (const auto& spans : timeline_.ranks) {
      for (const Span& span : spans) {
        const std::size_t width = column(span.end) - column(span.start);
        if (label(span.action, style_).size() + 1 > width) return false;
      }
    }
    return true;
  }

  [[nodiscard]] std::string line(const std::vector<Span>& spans) const {
    std::string text(column(timeline_.makespan), '.');
    for (const Span& span : spans) {
      const std::size_t start = column(span.start);
      std::string own = label(span.action, style_);
      own.resize(column(span.end) - start, ' ');
      text.replace(start, own.size(), own);
    }
    return text;
  }

  const Timeline& timeline_;
  double unit_;
  Style style_ = Style::kFull;
};

}  // namespace

std::string to_grid(const Timeline& timeline, double unit) {
  if (!(unit > 0) || timeline.makespan / unit > kMaxColumns) {
    throw ScheduleError(cat("unit is ", unit, "; a character needs a time above 0, and at least ",
                            timeline.makespan / kMaxColumns, " with a makespan of ",
                            timeline.makespan));
  }
  return Drawing(timeline, unit).draw();
}

}  // namespace dualpipe
