#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "comm/control_plane.h"
#include "comm/key_value_store.h"

namespace dualpipe {

// A control plane over a store whose keys belong to this pipeline alone.
[[nodiscard]] std::unique_ptr<ControlPlane> store_control_plane(
    std::unique_ptr<KeyValueStore> store, Rank rank, int num_ranks);

// Exchanges small texts between all ranks: the handshake at construction. Exchanges have numbers,
// counted in the store for each rank, so that any number of these objects can be made for one
// group. One thread at a time.
class StoreExchange {
 public:
  StoreExchange(std::unique_ptr<KeyValueStore> store, Rank rank, int num_ranks)
      : store_(std::move(store)), rank_(rank), num_ranks_(num_ranks) {}

  // Every rank's text, by rank. Throws PipelineError on all ranks when one is missing after
  // `timeout`, and names it.
  [[nodiscard]] std::vector<std::string> all_gather(const std::string& text,
                                                    std::chrono::milliseconds timeout);

 private:
  [[nodiscard]] std::string key(std::int64_t round, int rank) const;
  [[nodiscard]] bool await(std::int64_t round, std::chrono::milliseconds timeout);
  [[noreturn]] void give_up(std::int64_t round, std::chrono::milliseconds timeout);

  std::unique_ptr<KeyValueStore> store_;
  Rank rank_;
  int num_ranks_;
};

}  // namespace dualpipe
