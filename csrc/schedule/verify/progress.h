#pragma once

#include "schedule/schedule.h"
#include "schedule/verify/findings.h"

namespace dualpipe {

// Runs all rows without costs and reports every rank that cannot reach its end. Each action is
// visited once, and once more for each time it had to wait: linear in the schedule.

// Assumes that a result reaches every rank as soon as it is computed.
void check_compute_progress(const Schedule& schedule, Findings& findings);

// Follows verify_lowered's model of messages. Valid only once check_channel_order has found
// nothing.
void check_message_progress(const Schedule& lowered, Findings& findings);

// Reports channels whose sends and receives are in different orders.
void check_channel_order(const Schedule& lowered, Findings& findings);

}  // namespace dualpipe
