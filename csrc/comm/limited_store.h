#pragma once

#include <chrono>
#include <memory>

#include "comm/key_value_store.h"

namespace dualpipe {

// A store whose calls always end: if the process that hosts it is stopped, or its machine is cut
// off, a call would otherwise wait forever. Calls throw NoAnswer after `limit`; later ones, until
// something is answered, after a hundredth of it. What is written meanwhile arrives once the store
// recovers.
//
// Calls run one at a time on a thread of the store's own, which is left behind if a call never
// returns. In a forked child, which lacks the thread, the store leaks.
[[nodiscard]] std::unique_ptr<KeyValueStore> limited_store(std::unique_ptr<KeyValueStore> store,
                                                           std::chrono::milliseconds limit);

}  // namespace dualpipe
