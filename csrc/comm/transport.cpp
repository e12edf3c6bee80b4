#include "comm/transport.h"

#include <algorithm>

#include "common/error.h"

namespace dualpipe {

HostTransport::Extremes HostTransport::merged(const Extremes& one, const Extremes& other) {
  if (one.largest == 0) return other;
  if (other.largest == 0) return one;
  return {std::min(one.smallest, other.smallest), std::max(one.largest, other.largest)};
}

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

bool same_step(const StepInfo& one, const StepInfo& other) {
  return one.step == other.step && one.program_digest == other.program_digest;
}

std::string describe_mismatch(Rank rank, const StepInfo& info, Rank other_rank,
                              const StepInfo& other_info) {
  if (other_rank < rank) return describe_mismatch(other_rank, other_info, rank, info);
  const auto describe = [](Rank of, const StepInfo& step) {
    return cat("rank ", of, " runs \"", step.description, "\" (run ", step.step, ", program ",
               std::hex, step.program_digest, ")");
  };
  const bool same_run = info.step == other_info.step;
  return cat(
      "the ranks do not agree on what to run: ", describe(rank, info), ", ",
      describe(other_rank, other_info),
      "; all ranks must make the same calls in the same order, steps with the same schedule, "
      "number of micro-batches and mode",
      same_run ? ""
               : "; if a rank failed at the very end of a step, others have finished it: make the "
                 "pipeline anew on all ranks");
}

}  // namespace dualpipe
