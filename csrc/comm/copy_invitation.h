#pragma once

#include <string>

#include "comm/device_link.h"

namespace dualpipe {

// To memory of this node with such a name.
[[nodiscard]] Invitation invitation_to(const std::string& name);

// The name in an invitation of rank `from`; UserError where that is on another node.
[[nodiscard]] std::string name_in(const Invitation& invitation, Rank from);

}  // namespace dualpipe
