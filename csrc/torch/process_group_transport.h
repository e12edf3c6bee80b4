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

// The ends of one new pipeline on a c10d process group: messages over its backend for CPU tensors
// (gloo, ucc, ...), failures over its store.
struct ProcessGroupEnds {
  std::unique_ptr<HostTransport> transport;
  std::unique_ptr<ControlPlane> control;
};

// group_ranks: for each rank of the pipeline, its rank in the group. peers: see FramedOptions. All
// ranks of a group make their pipelines in the same order: the n-th on one rank is connected to the
// n-th on the others. Holds a reference to the group, which has a backend for CPU tensors.
[[nodiscard]] ProcessGroupEnds process_group_ends(c10d::ProcessGroup& group, Rank rank,
                                                  std::vector<int> group_ranks,
                                                  std::vector<Rank> peers);

// interrupted: as StoreExchange's.
[[nodiscard]] std::unique_ptr<StoreExchange> process_group_exchange(
    c10d::ProcessGroup& group, Rank rank, std::function<bool()> interrupted);

[[nodiscard]] bool has_cpu_backend(const c10d::ProcessGroup& group);

// Every rank's numbers, by rank of the group. All ranks give equally many; PipelineError when they
// are not there after timeout, or a rank is gone. Its tensors have no Python object: gloo's threads
// let go of them when they like, and take no interpreter lock to do so, which at the interpreter's
// end would abort the process.
[[nodiscard]] std::vector<std::vector<double>> process_group_all_gather(
    c10d::ProcessGroup& group, const std::vector<double>& values, std::chrono::milliseconds timeout,
    const std::function<bool()>& interrupted);

// c10d::ProcessGroup, for those that include no torch header.
[[nodiscard]] const std::type_info& process_group_type();

}  // namespace dualpipe
