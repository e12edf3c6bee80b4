#pragma once

#include <chrono>
#include <memory>

#include "comm/key_value_store.h"

namespace dualpipe {

// A store whose calls end: where the process that hosts it is stopped, or its machine cut off, a
// call would wait for ever. They throw NoAnswer after `limit`; the next ones, until something is
// answered, after a hundredth of it. What is written then arrives as soon as the store goes on.
//
// Calls run on a thread of its own, one at a time, which stays behind with one that never returns.
// In a forked child, which lacks it, the store leaks.
[[nodiscard]] std::unique_ptr<KeyValueStore> limited_store(std::unique_ptr<KeyValueStore> store,
                                                           std::chrono::milliseconds limit);

}  // namespace dualpipe
