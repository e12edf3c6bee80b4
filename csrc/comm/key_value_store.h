#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/error.h"

namespace dualpipe {

// What hosts a store is silent. It may go on.
class NoAnswer : public PipelineError {
 public:
  using PipelineError::PipelineError;
};

// The texts that the ranks of one group share, by key. Calls are short and never wait for a key;
// they throw PipelineError when the store is gone, some NoAnswer (limited_store.h). Thread-safe.
class KeyValueStore {
 public:
  virtual ~KeyValueStore() = default;
  virtual void set(const std::string& key, const std::string& value) = 0;
  // The key exists.
  [[nodiscard]] virtual std::string get(const std::string& key) = 0;
  [[nodiscard]] virtual bool has(const std::vector<std::string>& keys) = 0;  // all of them
  // Sets the value unless there is one.
  virtual void set_first(const std::string& key, const std::string& value) = 0;
  // Adds to a counter that begins at 0, and returns the sum.
  [[nodiscard]] virtual std::int64_t add(const std::string& key, std::int64_t amount) = 0;
  virtual void remove(const std::string& key) = 0;
};

}  // namespace dualpipe
