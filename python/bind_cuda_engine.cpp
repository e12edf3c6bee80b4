#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <tuple>

#include "bindings.h"
#include "comm/cuda_nccl.h"
#include "comm/loopback.h"
#include "comm/nccl_transport.h"
#include "engine/engine.h"
#include "interrupts.h"
#include "torch/cuda_device.h"
#include "torch/process_group_transport.h"

namespace py = pybind11;

namespace dualpipe {
namespace {

using Channel = std::tuple<int, MessageKind, bool>;  // peer, kind, outgoing

NcclTransportOptions options_of(int rank, const std::vector<Channel>& channels, int max_ctas,
                                bool dynamic_shapes, double timeout_seconds) {
  NcclTransportOptions options{.rank = Rank(rank),
                               .channels = {},
                               .nccl = {.max_ctas = max_ctas},
                               .timeout = milliseconds_of(timeout_seconds),
                               .dynamic_shapes = dynamic_shapes};
  for (const auto& [peer, kind, outgoing] : channels) {
    options.channels.push_back({Rank(peer), kind, outgoing});
  }
  return options;
}

std::unique_ptr<Engine> engine_over(std::unique_ptr<HostTransport> host,
                                    std::unique_ptr<ControlPlane> control,
                                    NcclTransportOptions options, int device) {
  const Rank rank = options.rank;
  const std::shared_ptr<Device> gpu = cuda_device(device);
  Watchdog::Options watchdog;
  watchdog.timeout = options.timeout;
  watchdog.interrupted = &InterruptScope::interrupted;
  return std::make_unique<Engine>(
      rank, nccl_transport(nccl_calls(device), gpu, std::move(host), std::move(options)),
      std::move(control), watchdog, gpu);
}

std::unique_ptr<Engine> process_engine(c10d::ProcessGroup& group, int rank,
                                       std::vector<int> group_ranks, const std::vector<int>& peers,
                                       const std::vector<Channel>& channels, int device,
                                       int max_ctas, bool dynamic_shapes, double timeout_seconds) {
  std::vector<Rank> peer_ranks;
  for (const int peer : peers) peer_ranks.emplace_back(peer);
  const py::gil_scoped_release unlocked;
  ProcessGroupEnds ends =
      process_group_ends(group, Rank(rank), std::move(group_ranks), std::move(peer_ranks));
  return engine_over(std::move(ends.transport), std::move(ends.control),
                     options_of(rank, channels, max_ctas, dynamic_shapes, timeout_seconds), device);
}

std::unique_ptr<Engine> thread_engine(const std::shared_ptr<LoopbackHub>& hub, int rank,
                                      const std::vector<Channel>& channels, int device,
                                      int max_ctas, bool dynamic_shapes, double timeout_seconds) {
  const py::gil_scoped_release unlocked;
  return engine_over(hub->transport(Rank(rank)), hub->control_plane(Rank(rank)),
                     options_of(rank, channels, max_ctas, dynamic_shapes, timeout_seconds), device);
}

void bind_cuda(py::module_& module) {
  module.def("nccl_version", &nccl_version, "The version of the NCCL that this process has.");
  module.def("loaded_nccls", &loaded_nccls, "The files of all NCCLs in this process.");
  module.def("require_one_nccl", &require_one_nccl, "Raises ValueError where the process has two.");
  module.def("nccl_engine", &process_engine, py::arg("group"), py::arg("rank"),
             py::arg("group_ranks"), py::arg("peers"), py::arg("channels"), py::arg("device"),
             py::arg("max_ctas"), py::arg("dynamic_shapes"), py::arg("timeout_seconds"),
             "An engine whose messages stay on the GPU. channels: (peer, kind, outgoing).");
  module.def("nccl_thread_engine", &thread_engine, py::arg("hub"), py::arg("rank"),
             py::arg("channels"), py::arg("device"), py::arg("max_ctas"), py::arg("dynamic_shapes"),
             py::arg("timeout_seconds"), "The same for ranks that are threads of one process.");
}

const PartOfModule part(&bind_cuda);

}  // namespace
}  // namespace dualpipe
