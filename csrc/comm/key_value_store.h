#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/error.h"

namespace dualpipe {

// The store's host did not answer in time. It may still recover.
class NoAnswer : public PipelineError {
 public:
  using PipelineError::PipelineError;
};

// Texts shared by the ranks of one group, by key. Calls are short and never wait for a key. They
// throw PipelineError when the store is gone; some stores throw NoAnswer (limited_store.h).
// Thread-safe.
class KeyValueStore {
 public:
  virtual ~KeyValueStore() = default;
  virtual void set(const std::string& key, const std::string& value) = 0;
  // The key must exist.
  [[nodiscard]] virtual std::string get(const std::string& key) = 0;
  [[nodiscard]] virtual bool has(const std::vector<std::string>& keys) = 0;  // all of them
  // Sets the value unless there is one.
  virtual void set_first(const std::string& key, const std::string& value) = 0;
  // Adds to a counter that begins at 0, and returns the sum.
  [[nodiscard]] virtual std::int64_t add(const std::string& key, std::int64_t amount) = 0;
  virtual void remove(const std::string& key) = 0;
};

}  // namespace dualpipe
