#pragma once

#include "schedule/schedule.h"
#include "schedule/verify/findings.h"

namespace dualpipe {

// Runs all rows without costs and reports every rank that cannot reach its end. Each action is
// visited once, and once more for each time it had to wait: linear in the schedule.

// Results are there as soon as they are computed.
void check_compute_progress(const Schedule& schedule, Findings& findings);

// Messages in the model of verify_lowered. Sends and receives of a channel must be in one order
// (check_channel_order) for its answer to mean something.
void check_message_progress(const Schedule& lowered, Findings& findings);

// Sends and receives of each channel come in one order.
void check_channel_order(const Schedule& lowered, Findings& findings);

}  // namespace dualpipe
