#include "comm/link_session.h"

namespace dualpipe {

Operations::Handle LinkSession::receive(Rank from, std::uint32_t tag, std::size_t capacity) {
  auto buffer = pool_.acquire(capacity);
  std::byte* const data = buffer->data();
  return add(from, std::move(buffer), [&] { return link_->receive(from, tag, data, capacity); });
}

Operations::Handle LinkSession::send(Rank to, std::uint32_t tag, std::shared_ptr<Buffer> buffer,
                                     std::size_t offset, std::size_t num_bytes) {
  std::byte* const data = buffer->data() + offset;
  return add(to, std::move(buffer), [&] { return link_->send(to, tag, data, num_bytes); });
}

template <typename Post>
Operations::Handle LinkSession::add(Rank peer, std::shared_ptr<Buffer> buffer, const Post& post) {
  try {
    return operations_.add({post(), std::move(buffer)});
  } catch (const PipelineError& error) {
    fail(FailureFlag::Kind::kPipeline,
         cat("rank ", rank_, " cannot reach rank ", peer, ": ", error.what()));
  }
  raise();
}

void LinkSession::raise() const {
  failure_.throw_if_set();
  throw InternalError(cat("rank ", rank_, ": an operation ended without a reason"));
}

void LinkSession::fail(FailureFlag::Kind kind, const std::string& text) noexcept {
  if (failure_.set(kind, text)) operations_.abort_all();
}

void LinkSession::recover() {
  operations_.bury();
  failure_.clear();
}

}  // namespace dualpipe
