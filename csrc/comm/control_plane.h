#pragma once

#include <optional>
#include <string>
#include <vector>

#include "comm/transport.h"

namespace dualpipe {

// The small, slow side channel of a pipeline: who failed, and where every rank is. Every method may
// be called from any thread, and throws PipelineError when the channel itself is gone. A channel
// that does not answer for a while is not a failure: calls then return after some seconds without
// news, and what was reported arrives later.
class ControlPlane {
 public:
  virtual ~ControlPlane() = default;

  // Reports a failure to all ranks. The first report of an epoch wins; later ones are dropped.
  virtual void report(const Failure& failure) = 0;

  // The failure of this epoch, if one is known. Cheap, never waits for another rank.
  [[nodiscard]] virtual std::optional<Failure> poll() = 0;

  // Where this rank is ("step 7, action 31 of 94: 2F5, waits for ..."), for the rank that reports.
  virtual void publish_position(const std::string& position) = 0;

  // The latest position of every rank, by rank; empty where none was published in this epoch.
  [[nodiscard]] virtual std::vector<std::string> positions() = 0;

  // For use after a failure was raised on this rank: from now on only later failures are seen.
  virtual void advance_epoch() = 0;
};

}  // namespace dualpipe
