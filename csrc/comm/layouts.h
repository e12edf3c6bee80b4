#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <tuple>
#include <utility>
#include <vector>

#include "memory/message.h"

namespace dualpipe {

// The layouts of one way's messages in the order of a step: written down in the first step of a
// kind, known in all others.
class WayLayouts {
 public:
  // The layout of the next message; null: it has to travel.
  [[nodiscard]] const Layout* next() {
    const std::size_t number = next_++;
    return number < known_.size() ? &known_[number] : nullptr;
  }
  void write_down(Layout layout) { written_.push_back(std::move(layout)); }
  void begin() {
    next_ = 0;
    written_.clear();
  }
  void commit() {
    if (known_.empty()) known_ = std::move(written_);
  }

 private:
  std::size_t next_ = 0;
  std::vector<Layout> known_;
  std::vector<Layout> written_;
};

// One kind of step: what is run, and the shapes that all ranks together put in.
using StepKind = std::tuple<std::uint64_t, std::uint64_t, std::uint64_t>;

struct StepLayouts {
  explicit StepLayouts(std::size_t num_ways) : ways(num_ways) {}
  std::vector<WayLayouts> ways;
};

// The layouts of the kinds of steps that were run last: inputs of ever new shapes must not fill the
// memory. All ranks run the same kinds in the same order, and so forget the same ones.
class KnownLayouts {
 public:
  static constexpr std::size_t kMaxKinds = 256;

  // Of a new kind nothing is known. Valid until the next call.
  [[nodiscard]] StepLayouts& of(const StepKind& kind, std::size_t num_ways);
  void clear() { recent_.clear(); }

 private:
  std::list<std::pair<StepKind, StepLayouts>> recent_;  // the last one first
};

// A layout as a message of host memory, and back.
[[nodiscard]] Message layout_message(const Layout& layout);
[[nodiscard]] Layout layout_of(const Message& message);

}  // namespace dualpipe
