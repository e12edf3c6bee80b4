#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

namespace dualpipe {

// Host memory that two ranks of one node share, be they processes or threads of one: a file in
// memory that has a name only until both have it. Mapped once a process, so that its threads see
// the same addresses. Zero when it is new. Thread-safe.
class SharedSegment {
 public:
  // Errors are PipelineErrors with the name.
  [[nodiscard]] static std::shared_ptr<SharedSegment> create(std::size_t num_bytes);
  // What the other rank made; takes its name away.
  [[nodiscard]] static std::shared_ptr<SharedSegment> open(const std::string& name,
                                                           std::size_t num_bytes);
  ~SharedSegment();
  SharedSegment(const SharedSegment&) = delete;
  SharedSegment& operator=(const SharedSegment&) = delete;

  [[nodiscard]] const std::string& name() const { return name_; }
  [[nodiscard]] std::byte* data() const { return data_; }

  // This process is side 0 or 1 from now on.
  void join(int side);
  // Whether a process is that side. One that was and has died is not, however it ended and whether
  // or not its parent knows: the kernel takes back its lock.
  [[nodiscard]] bool is_joined(int side);

  // What the first one who asks in this process makes; lasts as long as the mapping.
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
