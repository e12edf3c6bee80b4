#pragma once

#include <optional>
#include <string>
#include <vector>

#include "comm/transport.h"

namespace dualpipe {

// The small, slow side channel of a pipeline: who failed, and where everyone is. Every method may
// be called by any thread, and throws PipelineError when the channel itself is gone. One that is
// silent for a while is no failure: after some seconds calls return without news, and what was told
// arrives later.
class ControlPlane {
 public:
  virtual ~ControlPlane() = default;

  // Tells all ranks. The first report of an epoch wins; later ones are dropped.
  virtual void report(const Failure& failure) = 0;

  // The failure of this epoch, if one is known. Cheap, never waits for another rank.
  [[nodiscard]] virtual std::optional<Failure> poll() = 0;

  // Where this rank is ("step 7, action 31 of 94: 2F5, waits for ..."); read by whoever reports.
  virtual void publish_position(const std::string& position) = 0;

  // The latest position of every rank, by rank; empty where none was published in this epoch.
  [[nodiscard]] virtual std::vector<std::string> positions() = 0;

  // After a failure was raised on this rank: look at later failures only.
  virtual void advance_epoch() = 0;
};

}  // namespace dualpipe
