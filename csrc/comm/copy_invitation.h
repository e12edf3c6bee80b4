#pragma once

#include <string>

#include "comm/device_link.h"

namespace dualpipe {

// An invitation to the memory of this node that has this name.
[[nodiscard]] Invitation invitation_to(const std::string& name);

// The name in an invitation from rank `from`. Throws UserError if that rank is on another node.
[[nodiscard]] std::string name_in(const Invitation& invitation, Rank from);

}  // namespace dualpipe
