#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <typeinfo>
#include <vector>

#include "comm/control_plane.h"
#include "comm/store_control_plane.h"
#include "comm/transport.h"

namespace c10d {
class ProcessGroup;
}

namespace dualpipe {

// This rank's ends of one new pipeline on a c10d process group: messages go over its backend for
// CPU tensors (gloo, ucc, ...), failures over its store.
struct ProcessGroupEnds {
  std::unique_ptr<HostTransport> transport;
  std::unique_ptr<ControlPlane> control;
};

// group_ranks: for each rank of the pipeline, its rank in the group. peers: see FramedOptions. All
// ranks of a group must make their pipelines in the same order: the n-th on one rank is connected
// to the n-th on the others. Keeps a reference to the group's backend for CPU tensors, which must
// exist.
[[nodiscard]] ProcessGroupEnds process_group_ends(c10d::ProcessGroup& group, Rank rank,
                                                  std::vector<int> group_ranks,
                                                  std::vector<Rank> peers);

// interrupted: see StoreExchange.
[[nodiscard]] std::unique_ptr<StoreExchange> process_group_exchange(
    c10d::ProcessGroup& group, Rank rank, std::function<bool()> interrupted);

[[nodiscard]] bool has_cpu_backend(const c10d::ProcessGroup& group);

// Every rank's numbers, by rank of the group. All ranks must give equally many. Throws
// PipelineError if they are not there after `timeout`, or a rank is gone. Its tensors have no
// Python object: gloo's threads may release them at any time, and releasing a Python object would
// take the interpreter lock, which would abort the process at interpreter exit.
[[nodiscard]] std::vector<std::vector<double>> process_group_all_gather(
    c10d::ProcessGroup& group, const std::vector<double>& values, std::chrono::milliseconds timeout,
    const std::function<bool()>& interrupted);

// c10d::ProcessGroup, for code that includes no torch header.
[[nodiscard]] const std::type_info& process_group_type();

}  // namespace dualpipe
