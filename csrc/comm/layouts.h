#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <tuple>
#include <utility>
#include <vector>

#include "memory/message.h"

namespace dualpipe {

// The layouts of one way's messages in the order of a step: recorded in the first step of a kind,
// known in all others.
class WayLayouts {
 public:
  // The layout of the next message; null: unknown, it has to be sent.
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

// One kind of step: the program's digest, and the extremes of all ranks' StepInfo::shapes.
using StepKind = std::tuple<std::uint64_t, std::uint64_t, std::uint64_t>;

struct StepLayouts {
  explicit StepLayouts(std::size_t num_ways) : ways(num_ways) {}
  std::vector<WayLayouts> ways;
};

// The layouts of the most recent kinds of steps: inputs of ever new shapes must not fill the
// memory. All ranks run the same kinds in the same order, and so forget the same ones.
class KnownLayouts {
 public:
  static constexpr std::size_t kMaxKinds = 256;

  // Nothing is known of a new kind. The reference is valid until the next call.
  [[nodiscard]] StepLayouts& of(const StepKind& kind, std::size_t num_ways);
  void clear() { recent_.clear(); }

 private:
  std::list<std::pair<StepKind, StepLayouts>> recent_;  // the most recent first
};

// A layout as a message of host memory, and back.
[[nodiscard]] Message layout_message(const Layout& layout);
[[nodiscard]] Layout layout_of(const Message& message);

}  // namespace dualpipe
