#pragma once

#include <memory>
#include <vector>

#include "comm/byte_link.h"
#include "comm/transport.h"

namespace dualpipe {

// This rank's place in a pipeline that talks over a byte link.
struct FramedOptions {
  Rank rank;
  int num_ranks = 0;
  // The ranks that this one exchanges messages with, and no others. If a is a peer of b, b is one
  // of a.
  std::vector<Rank> peers;
  // Of the pipeline on its link; the same on all ranks. Tells pipelines that share a link apart.
  std::uint32_t instance = 0;
};

// A transport on top of a byte link that only matches tags.
//
// A message is one frame (comm/frame.h) and, once its size is known to both ends from an earlier
// step (comm/lane.h), one message of the link; a larger one travels as header, then body. Tags hold
// an epoch that recover() counts up: what was in flight in a failed step matches nothing later.
// Every step begins with a greeting to and from each peer; frames leave for a peer only after its
// greeting agreed, so that nobody sends what the other has not posted memory for. It ends with a
// dissemination barrier, which no rank leaves before all have entered. Two threads stand by: see
// comm/frame_sender.h.
[[nodiscard]] std::unique_ptr<HostTransport> framed_transport(std::unique_ptr<ByteLink> link,
                                                              FramedOptions options);

}  // namespace dualpipe
