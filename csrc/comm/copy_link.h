#pragma once

#include <memory>

#include "comm/copy_calls.h"
#include "comm/device_link.h"

namespace dualpipe {

// Ways between ranks of one node whose messages take no processor from computation: copy engines
// move them, and streams write and wait for flags in host memory.
//
// The receiver posts where it wants a message, and its stream raises a flag when that memory is
// free; the sender's stream copies and raises another one, for which whoever needs the message
// waits. A send whose receiver is not ready yet waits on the host: a thread of the link's own
// issues it as soon as it is, so that no message depends on what the host of its rank does next.
// The same thread finds ranks that have ended, and brings streams that wait for nothing any more to
// their end.
//
// Memory to receive into is exported to the peers. It and the mailboxes go when no stream of
// either rank uses them any more; what a peer that neither answers nor dies may still use is
// leaked.
[[nodiscard]] std::unique_ptr<DeviceLink> copy_link(std::shared_ptr<CopyCalls> calls,
                                                    std::shared_ptr<Device> device, Rank rank);

}  // namespace dualpipe
