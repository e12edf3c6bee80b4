#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "comm/control_plane.h"
#include "comm/key_value_store.h"

namespace dualpipe {

// A control plane over a store whose keys belong to this pipeline alone.
[[nodiscard]] std::unique_ptr<ControlPlane> store_control_plane(
    std::unique_ptr<KeyValueStore> store, Rank rank, int num_ranks);

// Exchanges small texts between all ranks, for the handshake at construction. Exchanges are
// numbered by a counter in the store for each rank, so that any number of these objects can be made
// for one group. One thread at a time.
class StoreExchange {
 public:
  // interrupted: called while waiting; returns whether this rank is to stop.
  StoreExchange(
      std::unique_ptr<KeyValueStore> store, Rank rank, int num_ranks,
      std::function<bool()> interrupted = [] { return false; })
      : store_(std::move(store)),
        rank_(rank),
        num_ranks_(num_ranks),
        interrupted_(std::move(interrupted)) {}

  // Every rank's text, by rank. If a rank is missing after `timeout`, throws a PipelineError that
  // names it on all ranks, including late ones.
  [[nodiscard]] std::vector<std::string> all_gather(const std::string& text,
                                                    std::chrono::milliseconds timeout);

 private:
  using Clock = std::chrono::steady_clock;

  [[nodiscard]] std::string key(std::int64_t round, int rank) const;
  [[nodiscard]] std::string get(const std::string& key, Clock::time_point deadline);
  [[nodiscard]] std::string await(std::int64_t round, std::chrono::milliseconds timeout,
                                  Clock::time_point deadline);
  [[nodiscard]] std::string missing(std::int64_t round);

  std::unique_ptr<KeyValueStore> store_;
  Rank rank_;
  int num_ranks_;
  std::function<bool()> interrupted_;
};

}  // namespace dualpipe
