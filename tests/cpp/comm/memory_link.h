#pragma once

#include <memory>

#include "comm/byte_link.h"
#include "comm/key_value_store.h"

namespace dualpipe::testing {

// A byte link between threads that behaves like gloo's: sends wait for receives; a message that is
// longer than the memory posted for it fails the test, and so does one whose memory is gone.
class LinkFabric {
 public:
  LinkFabric();
  ~LinkFabric();
  [[nodiscard]] std::unique_ptr<ByteLink> link(Rank rank);

  // Breaks every connection of a rank, as if its process had died.
  void kill(Rank rank);
  [[nodiscard]] int num_messages() const;  // sent so far, by all ranks

  struct State;

 private:
  std::shared_ptr<State> state_;
};

// A store in memory; all stores opened from one object share their values.
class SharedStore {
 public:
  SharedStore();
  ~SharedStore();
  [[nodiscard]] std::unique_ptr<KeyValueStore> open();

  // From now on every call throws, as if the process that hosts the store had died.
  void kill();
  // Until thaw() no call returns, as if that process were stopped.
  void freeze();
  void thaw();
  [[nodiscard]] std::size_t num_keys() const;

  struct State;

 private:
  std::shared_ptr<State> state_;
};

}  // namespace dualpipe::testing
