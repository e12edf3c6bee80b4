#pragma once

#include <memory>

#include "channel.h"

struct ncclComm {
  std::shared_ptr<simulated::Channel> channel;
  int rank = 0;
  bool is_connected = false;  // for messages: at the first group of them
};
