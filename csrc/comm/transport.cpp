#include "comm/transport.h"

#include "common/error.h"

namespace dualpipe {

std::string to_string(const MessageId& id) {
  switch (id.kind) {
    case MessageKind::kActivation:
      return cat("activation of micro-batch ", id.microbatch, " for stage ", id.stage);
    case MessageKind::kGradient:
      return cat("gradient of micro-batch ", id.microbatch, " for stage ", id.stage);
    case MessageKind::kMirrorLow:
    case MessageKind::kMirrorHigh:
      return cat("mirrored gradients of stage ", id.stage, ", bucket ", id.microbatch);
  }
  return cat("message of unknown kind ", static_cast<int>(id.kind));
}

}  // namespace dualpipe
