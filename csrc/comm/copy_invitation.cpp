#include "comm/copy_invitation.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <string_view>

#include "common/error.h"

namespace dualpipe {
namespace {

// "NODE NAME", padded with zeros.
std::string text_of(const Invitation& invitation) {
  return {invitation.begin(), std::find(invitation.begin(), invitation.end(), '\0')};
}

// Identifies the running system: no two have the same id; all containers on one system do.
std::string this_node() {
  std::string id;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> id;
  if (!id.empty()) return id;
  char host[64] = "";
  (void)gethostname(host, sizeof(host) - 1);
  return host;
}

}  // namespace

Invitation invitation_to(const std::string& name) {
  const std::string text = cat(this_node(), ' ', name);
  Invitation invitation{};
  DUALPIPE_CHECK(text.size() < invitation.size(), "the invitation \"", text, "\" is too long");
  std::copy(text.begin(), text.end(), invitation.begin());
  return invitation;
}

std::string name_in(const Invitation& invitation, Rank from) {
  const std::string text = text_of(invitation);
  const std::size_t space = text.find(' ');
  DUALPIPE_CHECK(space != std::string::npos, "\"", text, "\" invites nobody");
  DUALPIPE_USER_CHECK(text.substr(0, space) == this_node(), "rank ", from,
                      " is on another node, where copy engines do not reach: choose "
                      "DualPipeConfig(transport=\"nccl\")");
  return text.substr(space + 1);
}

}  // namespace dualpipe
