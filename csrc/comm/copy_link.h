#pragma once

#include <cstdint>
#include <memory>

#include "comm/copy_calls.h"
#include "comm/device_link.h"

namespace dualpipe {

// Whether each stream has a hardware queue to itself. Where streams share one, what waits at its
// head keeps back all behind it: a message that waits for computation may then keep back the very
// one that this computation waits for.
enum class Queues : std::uint8_t { kOwn, kShared };

// Ways between ranks of one node whose messages take no processor from computation: copy engines
// move them, and streams write and wait for flags in host memory.
//
// The receiver posts where it wants a message, and its stream raises a flag when that memory is
// free; the sender's stream copies and raises another one, for which whoever needs the message
// waits. A send whose receiver has not said where to waits on the host: a thread of the link's own
// issues it as soon as it has, so that no message depends on what the host of its rank does next.
// In shared queues that thread waits for memory and computation as well, and no stream of a way
// ever does. The same thread finds ranks that have ended, and brings streams that wait for nothing
// any more to their end.
//
// Memory to receive into is exported to the peers. It and the mailboxes go when no stream of
// either rank uses them any more; what a peer that neither answers nor dies may still use is
// leaked.
[[nodiscard]] std::unique_ptr<DeviceLink> copy_link(std::shared_ptr<CopyCalls> calls,
                                                    std::shared_ptr<Device> device, Rank rank,
                                                    Queues queues = Queues::kOwn);

}  // namespace dualpipe
