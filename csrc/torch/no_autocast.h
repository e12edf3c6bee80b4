#pragma once

#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace dualpipe {

// Turns off autocast in its scope: operations of this thread, and of backward passes that it runs,
// keep the types of their operands.
class NoAutocast {
 private:
  c10::impl::ExcludeDispatchKeyGuard guard_{c10::autocast_dispatch_keyset};
};

}  // namespace dualpipe
