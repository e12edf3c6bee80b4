#include <pybind11/operators.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "bindings.h"
#include "comm/loopback.h"
#include "common/error.h"
#include "engine/engine.h"
#include "engine_holder.h"
#include "interrupts.h"
#include "py_stage_functions.h"
#include "torch/mirror_exchange.h"
#include "torch/process_group_transport.h"
#include "torch/torch_stage_runner.h"

namespace py = pybind11;

namespace dualpipe {
namespace {

EngineHolder loopback_engine(const std::shared_ptr<LoopbackHub>& hub, int rank,
                             double timeout_seconds) {
  return EngineHolder(new Engine(Rank(rank), hub->transport(Rank(rank)),
                                 hub->control_plane(Rank(rank)),
                                 watchdog_options(milliseconds_of(timeout_seconds))));
}

EngineHolder process_group_engine(c10d::ProcessGroup& group, int rank, std::vector<int> group_ranks,
                                  const std::vector<int>& peers, double timeout_seconds) {
  const py::gil_scoped_release unlocked;
  ProcessGroupEnds ends =
      process_group_ends(group, Rank(rank), std::move(group_ranks), ids_of<Rank>(peers));
  return EngineHolder(new Engine(Rank(rank), std::move(ends.transport), std::move(ends.control),
                                 watchdog_options(milliseconds_of(timeout_seconds))));
}

at::Device message_device(Engine& engine, const std::string& device) {
  return at::Device(engine.transport().carries_device_memory() ? device : "cpu");
}

using MainGrads = std::vector<std::pair<int, std::vector<std::pair<at::Tensor, at::Tensor>>>>;

std::map<Stage, std::vector<GradTarget>> grad_targets(const MainGrads& main_grads) {
  std::map<Stage, std::vector<GradTarget>> targets;
  for (const auto& [stage, pairs] : main_grads) {
    for (const auto& [parameter, main] : pairs) targets[Stage(stage)].push_back({parameter, main});
  }
  return targets;
}

void run(Engine& engine, const Program& program, py::object functions, bool training,
         bool keep_outputs, const std::string& device, std::optional<MirrorExchange*> reducer,
         std::uint64_t shapes, const MainGrads& main_grads) {
  PyStageFunctions stages(std::move(functions));
  TorchStageRunner runner(stages, engine.weight_queue(),
                          {.training = training,
                           .keep_outputs = keep_outputs,
                           .device = at::Device(device),
                           .message_device = message_device(engine, device),
                           .main_grads = grad_targets(main_grads)});
  interruptible([&] { engine.run(program, runner, reducer.value_or(nullptr), shapes); });
}

void exchange(Engine& engine, MirrorExchange& reducer, const std::vector<int>& stages,
              const std::string& description) {
  const Program program = make_reduce_program(engine.rank(), ids_of<Stage>(stages), description);
  interruptible([&] { engine.exchange(program, reducer); });
}

std::unique_ptr<MirrorExchange> mirror_exchange(Engine& engine, int num_ranks,
                                                const std::vector<std::pair<int, Tensors>>& stages,
                                                std::size_t bucket_bytes, bool copy, bool together,
                                                const std::string& device) {
  std::vector<StageTensors> tensors;
  for (const auto& [stage, list] : stages) tensors.push_back({Stage(stage), list});
  using Mode = MirrorExchange::Mode;
  return std::make_unique<MirrorExchange>(
      engine.transport(), engine.device(), std::move(tensors),
      MirrorExchange::Options{.rank = engine.rank(),
                              .num_ranks = num_ranks,
                              .bucket_bytes = bucket_bytes,
                              .mode = copy ? Mode::kCopy : Mode::kSumGradients,
                              .together = together,
                              .message_device = message_device(engine, device)});
}

const Trace& trace_of(Engine& engine) {
  if (!engine.blocks_on_trace()) return engine.trace();
  const py::gil_scoped_release unlocked;  // other ranks may need the lock to get this far
  return engine.trace();
}

py::list trace_events(const Trace& trace) {
  py::list events;
  for (const TraceEvent& event : trace.events) {
    events.append(
        py::make_tuple(to_string(event.action), event.start_ns, event.end_ns, event.wait_ns));
  }
  return events;
}

}  // namespace

void bind_engine(py::module_& module) {
  py::class_<MessageWay>(module, "MessageWay", "One way for one kind of message to or from a rank.")
      .def_property_readonly("peer", [](const MessageWay& way) { return way.peer.value(); })
      .def_readonly("kind", &MessageWay::kind)
      .def(py::self == py::self);

  py::class_<Program>(module, "Program", "One rank's schedule, resolved for the engine.")
      .def(py::init([](const Schedule& lowered, int rank, std::string description) {
             return make_program(lowered, Rank(rank), std::move(description));
           }),
           py::arg("lowered"), py::arg("rank"), py::arg("description"))
      .def_readonly("planned_peak_activations", &Program::planned_peak_activations)
      .def_property_readonly("message_ways", &message_ways, "All that it sends and receives by.")
      .def_readonly("description", &Program::description)
      .def("__len__", [](const Program& program) { return program.instructions.size(); });

  py::class_<MirrorExchange>(module, "MirrorExchange",
                             "Sums or copies the tensors of mirrored stages.");
  module.def(
      "noting_interrupts",
      [](const py::function& work) {
        const InterruptScope scope;
        work();
      },
      py::arg("work"),
      "Calls work(); on the main thread, Ctrl-C meanwhile ends the steps of all threads' engines.");
  module.def(
      "mirror_ways", [](int rank, int num_ranks) { return mirror_ways(Rank(rank), num_ranks); },
      py::arg("rank"), py::arg("num_ranks"), "The ways that the exchanges between mirrors take.");

  py::class_<Engine, EngineHolder>(module, "Engine", "One rank of one pipeline.")
      .def_static("loopback", &loopback_engine, py::arg("hub"), py::arg("rank"),
                  py::arg("timeout_seconds"), py::call_guard<py::gil_scoped_release>())
      .def_static("process_group", &process_group_engine, py::arg("group"), py::arg("rank"),
                  py::arg("group_ranks"), py::arg("peers"), py::arg("timeout_seconds"))
      .def("run", &run, py::arg("program"), py::arg("functions"), py::arg("training"),
           py::arg("keep_outputs"), py::arg("device"), py::arg("reducer"), py::arg("shapes") = 0,
           py::arg("main_grads") = MainGrads())
      .def(
          "connect", [](Engine& engine) { interruptible([&] { engine.connect(); }); },
          "Meets the other ranks ahead of the first step; on all of them, or on none.")
      .def(
          "synchronize", [](Engine& engine) { interruptible([&] { engine.synchronize(); }); },
          "Waits for the devices of all ranks; on all of them, or on none.")
      .def("exchange", &exchange, py::arg("reducer"), py::arg("stages"), py::arg("description"))
      .def("fail", &Engine::fail, py::arg("text"), py::arg("is_step"),
           py::call_guard<py::gil_scoped_release>())
      .def("resume_at", &Engine::resume_at, py::arg("num_steps"))
      .def("mirror_exchange", &mirror_exchange, py::arg("num_ranks"), py::arg("stages"),
           py::arg("bucket_bytes"), py::arg("copy"), py::arg("together"), py::arg("device"),
           py::keep_alive<0, 1>())
      .def_property_readonly("failure", &Engine::failure,
                             "What this rank last told the others; empty: nothing yet.")
      .def_property_readonly("cursor", &Engine::cursor)
      .def_property_readonly(
          "trace_events", [](Engine& engine) { return trace_events(trace_of(engine)); },
          "(action, start, end, wait) of each computation of the last step; nanoseconds.")
      .def("time_device", &Engine::time_device, py::arg("on"),
           "Whether the steps from now on are timed by the clock of their device, where it is "
           "known.")
      .def_property_readonly(
          "times_are_of_the_device",
          [](Engine& engine) { return trace_of(engine).clock == Clock::kDevice; })
      .def_property_readonly("step_ns", [](Engine& engine) { return trace_of(engine).duration_ns; })
      .def_property_readonly("busy_ns", [](Engine& engine) { return trace_of(engine).busy_ns(); })
      .def_property_readonly("peak_live_activations",
                             [](Engine& engine) { return trace_of(engine).peak_live_activations; });
}

}  // namespace dualpipe
