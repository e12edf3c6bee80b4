#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

namespace dualpipe {

// Host memory shared by two ranks of one node, whether these are processes or threads of one: a
// file in memory that has a name only until both have opened it. Mapped once per process, so that
// its threads see the same addresses. Initially zero. Thread-safe.
class SharedSegment {
 public:
  // Errors are PipelineErrors that contain the name.
  [[nodiscard]] static std::shared_ptr<SharedSegment> create(std::size_t num_bytes);
  // Opens what the other rank created, and removes its name.
  [[nodiscard]] static std::shared_ptr<SharedSegment> open(const std::string& name,
                                                           std::size_t num_bytes);
  ~SharedSegment();
  SharedSegment(const SharedSegment&) = delete;
  SharedSegment& operator=(const SharedSegment&) = delete;

  [[nodiscard]] const std::string& name() const { return name_; }
  [[nodiscard]] std::byte* data() const { return data_; }

  // From now on this process is that side, 0 or 1.
  void join(int side);
  // Whether a living process is that side. One that has died does not count, however it ended and
  // whether or not its parent knows: the kernel releases its lock, once no forked child of it
  // lives.
  [[nodiscard]] bool is_joined(int side);

  // Returns what the first call in this process makes; it lasts as long as the mapping.
  [[nodiscard]] std::shared_ptr<void> once(const std::function<std::shared_ptr<void>()>& make);

 private:
  SharedSegment(std::string name, int file, std::size_t num_bytes);

  const std::string name_;
  const int file_;
  const std::size_t num_bytes_;
  std::byte* data_ = nullptr;
  std::mutex mutex_;
  bool joined_here_[2] = {false, false};
  std::shared_ptr<void> made_;
};

}  // namespace dualpipe
