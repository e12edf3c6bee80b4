#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "bindings.h"
#include "comm/copy_link.h"
#include "comm/cuda_copies.h"
#include "comm/cuda_nccl.h"
#include "comm/device_transport.h"
#include "comm/loopback.h"
#include "comm/nccl_link.h"
#include "engine/engine.h"
#include "engine_holder.h"
#include "interrupts.h"
#include "torch/cuda_device.h"
#include "torch/process_group_transport.h"

namespace py = pybind11;

namespace dualpipe {
namespace {

struct GpuOptions {
  std::vector<MessageWay> ways;
  int device;
  bool by_copies;          // rather than over NCCL
  bool queues_are_shared;  // matters only for copies
  bool reductions_may_wait;
  int max_ctas;
  bool dynamic_shapes;
};

LinkMaker link_maker(const GpuOptions& gpu, const std::shared_ptr<Device>& device, Rank rank) {
  if (gpu.by_copies) {
    const Queues queues = gpu.queues_are_shared ? Queues::kShared : Queues::kOwn;
    return [calls = cuda_copies(gpu.device), device, rank, queues] {
      return copy_link(calls, device, rank, queues);
    };
  }
  const NcclOptions options{.max_ctas = gpu.max_ctas};
  return [calls = nccl_calls(gpu.device), device, rank, options] {
    return std::make_unique<NcclLink>(calls, device, rank, options);
  };
}

EngineHolder engine_over(std::unique_ptr<HostTransport> host, std::unique_ptr<ControlPlane> control,
                         Rank rank, const GpuOptions& gpu, std::chrono::milliseconds timeout) {
  const std::shared_ptr<Device> device = cuda_device(gpu.device, gpu.reductions_may_wait);
  DeviceTransportOptions options{
      .rank = rank, .ways = gpu.ways, .timeout = timeout, .dynamic_shapes = gpu.dynamic_shapes};
  return EngineHolder(new Engine(
      rank,
      device_transport(link_maker(gpu, device, rank), device, std::move(host), std::move(options)),
      std::move(control), watchdog_options(timeout), device));
}

EngineHolder process_engine(c10d::ProcessGroup& group, int rank, std::vector<int> group_ranks,
                            const std::vector<int>& peers, const GpuOptions& gpu,
                            double timeout_seconds) {
  const py::gil_scoped_release unlocked;
  ProcessGroupEnds ends =
      process_group_ends(group, Rank(rank), std::move(group_ranks), ids_of<Rank>(peers));
  return engine_over(std::move(ends.transport), std::move(ends.control), Rank(rank), gpu,
                     milliseconds_of(timeout_seconds));
}

EngineHolder thread_engine(const std::shared_ptr<LoopbackHub>& hub, int rank, const GpuOptions& gpu,
                           double timeout_seconds) {
  const py::gil_scoped_release unlocked;
  return engine_over(hub->transport(Rank(rank)), hub->control_plane(Rank(rank)), Rank(rank), gpu,
                     milliseconds_of(timeout_seconds));
}

GpuOptions make_options(std::vector<MessageWay> ways, int device, bool by_copies,
                        bool queues_are_shared, bool reductions_may_wait, int max_ctas,
                        bool dynamic_shapes) {
  return {.ways = std::move(ways),
          .device = device,
          .by_copies = by_copies,
          .queues_are_shared = queues_are_shared,
          .reductions_may_wait = reductions_may_wait,
          .max_ctas = max_ctas,
          .dynamic_shapes = dynamic_shapes};
}

void bind_cuda(py::module_& module) {
  module.def("nccl_version", &nccl_version, "The version of the NCCL that this process has.");
  module.def("loaded_nccls", &loaded_nccls, "The files of all NCCLs in this process.");
  module.def("require_one_nccl", &require_one_nccl, "Raises ValueError where the process has two.");
  module.def(
      "clock_by_gpu",
      [](Engine& engine, int device) { engine.clock_with(cuda_stopwatches(device)); },
      py::arg("engine"), py::arg("device"),
      "Its stages are on this GPU, whose clock is asked for.");
  py::class_<GpuOptions>(module, "GpuOptions", "What _transport.GpuSettings says.")
      .def(py::init(&make_options), py::kw_only(), py::arg("ways"), py::arg("device"),
           py::arg("by_copies"), py::arg("queues_are_shared"), py::arg("reductions_may_wait"),
           py::arg("max_ctas"), py::arg("dynamic_shapes"));
  module.def("gpu_engine", &process_engine, py::arg("group"), py::arg("rank"),
             py::arg("group_ranks"), py::arg("peers"), py::arg("options"),
             py::arg("timeout_seconds"), "An engine whose messages stay on the GPU.");
  module.def("gpu_thread_engine", &thread_engine, py::arg("hub"), py::arg("rank"),
             py::arg("options"), py::arg("timeout_seconds"),
             "The same for ranks that are threads of one process.");
}

const PartOfModule part(&bind_cuda);

}  // namespace
}  // namespace dualpipe
