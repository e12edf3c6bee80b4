#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>

namespace dualpipe {

// Why every call of one rank's transport must throw, until the rank recovers. Thread-safe; checking
// costs one load. Every thread gets its own exception object.
class FailureFlag {
 public:
  enum class Kind : std::uint8_t { kPipeline, kUser };  // PipelineError, UserError

  // The first failure counts; returns whether this was the first.
  bool set(Kind kind, std::string text);
  void clear();

  [[nodiscard]] bool is_set() const { return set_.load(std::memory_order_acquire); }
  void throw_if_set() const {
    if (is_set()) [[unlikely]] {
      raise();
    }
  }

 private:
  void raise() const;

  std::atomic<bool> set_{false};
  mutable std::mutex mutex_;
  Kind kind_ = Kind::kPipeline;
  std::string text_;
};

}  // namespace dualpipe
