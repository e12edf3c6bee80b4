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
  // All ranks that this one exchanges messages with. If a is a peer of b, b is a peer of a.
  std::vector<Rank> peers;
  // The pipeline's number on its link, the same on all ranks. Tells apart pipelines that share a
  // link.
  std::uint32_t instance = 0;
};

// A transport on top of a byte link that only matches tags.
//
// A message is one frame (comm/frame.h). It is also one message of the link if it is no larger than
// both ends know from earlier steps (comm/lane.h); a larger one travels as header, then body. Tags
// contain an epoch that recover() increments: what was in flight in a failed step matches nothing
// later. Every step begins with a greeting to and from each peer; frames leave for a peer only
// after its greeting has matched, so that nobody sends what the other has not posted memory for.
// The step ends with a dissemination barrier, which no rank leaves before all have entered. There
// are two helper threads: see comm/frame_sender.h.
[[nodiscard]] std::unique_ptr<HostTransport> framed_transport(std::unique_ptr<ByteLink> link,
                                                              FramedOptions options);

}  // namespace dualpipe
