#include "comm/layouts.h"

#include "comm/bytes.h"
#include "common/error.h"

namespace dualpipe {

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
