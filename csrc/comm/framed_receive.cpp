#include "comm/framed_receive.h"

#include <utility>

#include "common/error.h"

namespace dualpipe {

FramedReceive::FramedReceive(const Step& step, Rank from, const MessageId& id, Lane& lane)
    : step_(step),
      epoch_(step.epoch),
      from_(from),
      id_(id),
      lane_(lane),
      place_(lane.next()),
      handle_(step.session.receive(from, step.tags(epoch_, Traffic::kFrame, id.kind),
                                   place_.capacity)) {}

Arrival FramedReceive::wait() {
  step_.session.throw_if_failed();
  DUALPIPE_CHECK(epoch_ == step_.epoch, "a receive of a failed step is waited for");
  std::shared_ptr<Buffer> buffer = await(handle_);
  const FrameHeader header = decode_header(buffer->data());
  check(header);
  lane_.record(place_.number, header.num_bytes);
  if (!header.split) {
    std::byte* const body = buffer->data() + sizeof(FrameHeader);
    return {decode_body(header, body, std::move(buffer)), nullptr};
  }
  const std::uint32_t tag = step_.tags(epoch_, Traffic::kBody, id_.kind, place_.number);
  buffer = await(step_.session.receive(from_, tag, header.num_bytes - sizeof(FrameHeader)));
  std::byte* const body = buffer->data();
  return {decode_body(header, body, std::move(buffer)), nullptr};
}

std::shared_ptr<Buffer> FramedReceive::await(Operations::Handle handle) const {
  return step_.session.await(
      handle, [this] { return cat("waits for the ", to_string(id_), " from rank ", from_); });
}

void FramedReceive::check(const FrameHeader& header) const {
  if (message_id(header) == id_ && header.step == step_.number) return;
  throw PipelineError(cat("rank ", from_, " -> rank ", step_.session.rank(), ": expected the ",
                          to_string(id_), " of step ", step_.number, ", got the ",
                          to_string(message_id(header)), " of step ", header.step,
                          ": a message between them was lost"));
}

}  // namespace dualpipe
