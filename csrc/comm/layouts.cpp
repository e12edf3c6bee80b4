#include "comm/layouts.h"

#include <algorithm>

#include "comm/bytes.h"
#include "common/error.h"

namespace dualpipe {

StepLayouts& KnownLayouts::of(const StepKind& kind, std::size_t num_ways) {
  const auto found = std::find_if(recent_.begin(), recent_.end(),
                                  [&kind](const auto& entry) { return entry.first == kind; });
  if (found != recent_.end()) {
    recent_.splice(recent_.begin(), recent_, found);
  } else {
    recent_.emplace_front(kind, StepLayouts(num_ways));
    if (recent_.size() > kMaxKinds) recent_.pop_back();
  }
  return recent_.front().second;
}

Message layout_message(const Layout& layout) {
  return bytes_message(layout.data(), layout.size() * sizeof(TensorSpec));
}

Layout layout_of(const Message& message) {
  DUALPIPE_CHECK(message.num_tensors() == 1, "not a layout: ", to_string(message.layout));
  Layout layout(message.layout[0].num_bytes / sizeof(TensorSpec));
  read_bytes(message, layout.data(), layout.size() * sizeof(TensorSpec));
  return layout;
}

}  // namespace dualpipe
