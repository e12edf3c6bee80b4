#pragma once

#include <exception>
#include <memory>
#include <string>
#include <utility>

#include "comm/byte_link.h"
#include "comm/failure_flag.h"
#include "comm/operations.h"
#include "common/error.h"
#include "memory/buffer_pool.h"

namespace dualpipe {

// One rank's use of a byte link: operations in pooled memory, ended together by the first failure.
// A link that breaks is such a failure. Thread-safe, except recover().
class LinkSession {
 public:
  LinkSession(std::unique_ptr<ByteLink> link, Rank rank) : link_(std::move(link)), rank_(rank) {}

  [[nodiscard]] Rank rank() const { return rank_; }
  [[nodiscard]] std::shared_ptr<Buffer> acquire(std::size_t num_bytes) {
    return pool_.acquire(num_bytes);
  }

  [[nodiscard]] Operations::Handle receive(Rank from, std::uint32_t tag, std::size_t capacity);
  // Sends part of a buffer.
  [[nodiscard]] Operations::Handle send(Rank to, std::uint32_t tag, std::shared_ptr<Buffer> buffer,
                                        std::size_t offset, std::size_t num_bytes);

  // Waits for an operation and returns its memory; if this rank has failed, throws the reason.
  // describe() says what the rank was doing, in case the link breaks: "waits for ... from rank 2".
  template <typename Describe>
  std::shared_ptr<Buffer> await(Operations::Handle handle, const Describe& describe) {
    try {
      if (handle->operation->wait()) return operations_.finish(handle);
    } catch (const PipelineError& error) {
      fail(FailureFlag::Kind::kPipeline, cat("rank ", rank_, " ", describe(), ": ", error.what()));
    }
    raise();
  }

  void throw_if_failed() const { failure_.throw_if_set(); }
  // For threads that nobody waits for: drops what a task throws because the session has failed, as
  // everyone who uses the session gets that failure anyway.
  template <typename Task>
  void unless_failed(const Task& task) const {
    try {
      task();
    } catch (const std::exception&) {
      if (!failure_.is_set()) throw;
    }
  }
  void fail(FailureFlag::Kind kind, const std::string& text) noexcept;

  // Operations from before must not be used any more.
  void recover();

 private:
  template <typename Post>
  Operations::Handle add(Rank peer, std::shared_ptr<Buffer> buffer, const Post& post);
  [[noreturn]] void raise() const;

  const std::unique_ptr<ByteLink> link_;
  const Rank rank_;
  BufferPool pool_;
  FailureFlag failure_;
  Operations operations_{failure_};
};

}  // namespace dualpipe
