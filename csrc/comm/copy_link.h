#pragma once

#include <cstdint>
#include <memory>

#include "comm/copy_calls.h"
#include "comm/device_link.h"

namespace dualpipe {

// Whether each stream has a hardware queue of its own. In a shared queue, a wait at the head blocks
// everything behind it: a message that waits for computation may then block the very message that
// this computation waits for.
enum class Queues : std::uint8_t { kOwn, kShared };

// Ways between ranks of one node whose messages take no processors from computation: copy engines
// move the data, and streams write and wait for flags in host memory.
//
// The receiver posts where it wants a message, and its stream raises a flag when that memory is
// free; the sender's stream then copies and raises another flag, which whoever needs the message
// waits for. A send whose receiver has not posted yet waits on the host: a thread of the link's own
// issues it as soon as the posting is there, so that no message depends on what the rank's host
// does next. With shared queues this thread also waits for memory and computation, so that no
// stream of a way ever does. The same thread detects ranks that have ended, and releases streams
// whose wait can no longer be satisfied.
//
// Memory to receive into is exported to the peers. It and the mailboxes are freed when no stream of
// either rank uses them any more; what a peer that neither answers nor dies may still use is
// leaked.
[[nodiscard]] std::unique_ptr<DeviceLink> copy_link(std::shared_ptr<CopyCalls> calls,
                                                    std::shared_ptr<Device> device, Rank rank,
                                                    Queues queues = Queues::kOwn);

}  // namespace dualpipe
