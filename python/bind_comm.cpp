#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>

#include "bindings.h"
#include "comm/loopback.h"
#include "common/error.h"
#include "delete_unlocked.h"
#include "interrupts.h"
#include "torch/process_group_transport.h"

namespace py = pybind11;

namespace dualpipe {
namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;
using ExchangeHolder = std::unique_ptr<StoreExchange, DeleteUnlocked>;

// (dtype code, whether a gradient is required, shape, bytes).
using RawTensor = std::tuple<int, bool, std::vector<std::int64_t>, py::bytes>;
using RawMessage = std::vector<std::optional<RawTensor>>;

// By its type only: torch's headers would add half a minute to the user's first build.
c10d::ProcessGroup& process_group(const py::handle& object) {
  py::detail::type_caster_generic caster(process_group_type());
  if (!caster.load(object, false) || caster.value == nullptr) {
    throw py::type_error(
        cat("expected a torch.distributed.ProcessGroup, found ", Py_TYPE(object.ptr())->tp_name));
  }
  return *static_cast<c10d::ProcessGroup*>(caster.value);
}

TensorSpec spec_of(const RawTensor& tensor, std::size_t num_bytes) {
  const auto& [dtype, requires_grad, shape, bytes] = tensor;
  DUALPIPE_USER_CHECK(shape.size() <= kMaxDims, "a tensor of ", shape.size(),
                      " dimensions: at most ", kMaxDims, " can travel");
  TensorSpec spec;
  spec.dtype = static_cast<std::int8_t>(dtype);
  spec.num_dims = static_cast<std::uint8_t>(shape.size());
  spec.requires_grad = requires_grad;
  std::copy(shape.begin(), shape.end(), spec.shape.begin());
  spec.num_bytes = num_bytes;
  return spec;
}

Message message_of(const RawMessage& tensors) {
  auto storage = std::make_shared<std::vector<std::string>>();
  for (const auto& tensor : tensors) {
    storage->push_back(tensor ? std::string(std::get<py::bytes>(*tensor)) : std::string());
  }
  Message message{{}, {}, storage};
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    std::string& bytes = (*storage)[i];
    message.layout.push_back(tensors[i] ? spec_of(*tensors[i], bytes.size()) : TensorSpec{});
    message.data.push_back(tensors[i] ? reinterpret_cast<std::byte*>(bytes.data()) : nullptr);
  }
  return message;
}

RawMessage raw_message(const Message& message) {
  RawMessage tensors;
  for (std::size_t i = 0; i < message.num_tensors(); ++i) {
    const TensorSpec& spec = message.layout[i];
    if (spec.absent()) {
      tensors.emplace_back();
      continue;
    }
    tensors.emplace_back(RawTensor(
        spec.dtype, spec.requires_grad, {spec.shape.begin(), spec.shape.begin() + spec.num_dims},
        py::bytes(reinterpret_cast<const char*>(message.data[i]), spec.num_bytes)));
  }
  return tensors;
}

MessageId message_id(MessageKind kind, int stage, int microbatch) {
  return {kind, Stage(stage), Microbatch(microbatch)};
}

void send(Transport& transport, int to, MessageKind kind, int stage, int microbatch,
          const RawMessage& tensors) {
  Message message = message_of(tensors);
  const py::gil_scoped_release unlocked;
  (void)transport.send(Rank(to), message_id(kind, stage, microbatch), std::move(message), nullptr);
}

RawMessage wait(PendingReceive& receive) {
  Message message;
  {
    const py::gil_scoped_release unlocked;
    message = receive.wait().message;
  }
  return raw_message(message);
}

using Injector = std::function<Fault(int from, int to, MessageKind, int stage, int microbatch)>;

// Called without the interpreter lock: pybind11 takes it to copy, call and destroy the function.
void inject(LoopbackHub& hub, const std::optional<Injector>& injector) {
  if (!injector) return hub.inject(nullptr);
  hub.inject([call = *injector](Rank from, Rank to, const MessageId& id) {
    return call(from.value(), to.value(), id.kind, id.stage.value(), id.microbatch.value());
  });
}

std::shared_ptr<LoopbackHub> make_hub(int num_ranks, double latency, double bandwidth) {
  LinkOptions link;
  link.latency = std::chrono::nanoseconds(static_cast<std::int64_t>(latency * 1e9));
  link.bytes_per_second = bandwidth;
  return LoopbackHub::create(num_ranks, link);
}

std::optional<std::tuple<int, std::int64_t, std::string>> poll(ControlPlane& control) {
  const auto failure = control.poll();
  if (!failure) return std::nullopt;
  return std::tuple(failure->rank.value(), failure->step, failure->text);
}

auto make_process_group_ends(const py::object& group, int rank, std::vector<int> group_ranks,
                             const std::vector<int>& peers) {
  c10d::ProcessGroup& native = process_group(group);
  const py::gil_scoped_release unlocked;
  ProcessGroupEnds ends =
      process_group_ends(native, Rank(rank), std::move(group_ranks), ids_of<Rank>(peers));
  return std::pair(std::unique_ptr<Transport>(std::move(ends.transport)), std::move(ends.control));
}

void bind_transport(py::module_& module) {
  py::enum_<MessageKind>(module, "MessageKind", "What a channel carries.")
      .value("ACTIVATION", MessageKind::kActivation)
      .value("GRADIENT", MessageKind::kGradient)
      .value("MIRROR_LOW", MessageKind::kMirrorLow)
      .value("MIRROR_HIGH", MessageKind::kMirrorHigh);

  py::class_<PendingReceive>(module, "PendingReceive", "A message that was asked for.")
      .def("wait", &wait, "Blocks until the message is there and returns its tensors. Once only.");

  py::class_<Transport>(module, "Transport",
                        "Moves messages between the ranks of one pipeline. A tensor is None or "
                        "(dtype code, requires_grad, shape, bytes).")
      .def(
          "begin_step",
          [](Transport& transport, std::int64_t step, std::uint64_t digest,
             const std::string& description) { transport.begin_step({step, digest, description}); },
          py::arg("step"), py::arg("program_digest"), py::arg("description"), Unlocked())
      .def("send", &send, py::arg("to"), py::arg("kind"), py::arg("stage"), py::arg("microbatch"),
           py::arg("tensors"))
      .def(
          "receive",
          [](Transport& transport, int from, MessageKind kind, int stage, int microbatch) {
            return transport.receive(Rank(from), message_id(kind, stage, microbatch));
          },
          py::arg("source"), py::arg("kind"), py::arg("stage"), py::arg("microbatch"),
          py::keep_alive<0, 1>(), Unlocked())
      .def("end_step", &Transport::end_step, Unlocked())
      .def(
          "abort",
          [](Transport& transport, int rank, std::int64_t step, const std::string& text) {
            transport.abort({Rank(rank), step, text});
          },
          py::arg("rank"), py::arg("step"), py::arg("text"), Unlocked())
      .def("recover", &Transport::recover, Unlocked());

  py::class_<ControlPlane>(module, "ControlPlane", "Who failed, and where everyone is.")
      .def(
          "report",
          [](ControlPlane& control, int rank, std::int64_t step, const std::string& text) {
            control.report({Rank(rank), step, text});
          },
          py::arg("rank"), py::arg("step"), py::arg("text"), Unlocked())
      .def("poll", &poll, Unlocked(), "(rank, step, text) of this epoch's failure, or None.")
      .def("publish_position", &ControlPlane::publish_position, py::arg("position"), Unlocked())
      .def("positions", &ControlPlane::positions, Unlocked())
      .def("advance_epoch", &ControlPlane::advance_epoch, Unlocked());
}

void bind_loopback(py::module_& module) {
  py::enum_<Fault>(module, "Fault", "What happens to a message.")
      .value("NONE", Fault::kNone)
      .value("FAIL", Fault::kFail)
      .value("DROP", Fault::kDrop);

  py::class_<LoopbackHub, std::shared_ptr<LoopbackHub>>(
      module, "LoopbackHub", "What the ranks of a pipeline share when they are threads.")
      .def(py::init(&make_hub), py::arg("num_ranks"), py::arg("latency") = 0.0,
           py::arg("bandwidth") = 0.0, "Latency in seconds, bandwidth in bytes a second (0: any).")
      .def(
          "transport",
          [](LoopbackHub& hub, int rank) -> std::unique_ptr<Transport> {
            return hub.transport(Rank(rank));
          },
          py::arg("rank"), Unlocked())
      .def(
          "control_plane", [](LoopbackHub& hub, int rank) { return hub.control_plane(Rank(rank)); },
          py::arg("rank"), Unlocked())
      .def("inject", &inject, py::arg("injector").none(true), Unlocked(),
           "Asks injector(source, destination, kind, stage, microbatch) what happens to each "
           "message that is sent.")
      .def(
          "all_gather",
          [](LoopbackHub& hub, int rank, const std::string& text, double timeout) {
            return hub.all_gather(Rank(rank), text, milliseconds_of(timeout));
          },
          py::arg("rank"), py::arg("text"), py::arg("timeout"), Unlocked());
}

void bind_process_group(py::module_& module) {
  module.def("process_group_ends", &make_process_group_ends, py::arg("group"), py::arg("rank"),
             py::arg("group_ranks"), py::arg("peers"),
             "The (Transport, ControlPlane) of a new pipeline on a process group. group_ranks[r] "
             "is the rank in the group of the pipeline's rank r.");

  module.def(
      "has_cpu_backend",
      [](const py::object& group) { return has_cpu_backend(process_group(group)); },
      py::arg("group"), "Whether a process group carries tensors of the host.");

  module.def(
      "process_group_all_gather",
      [](const py::object& group, const std::vector<double>& values, double timeout) {
        c10d::ProcessGroup& ranks = process_group(group);
        return interruptible([&] {
          return process_group_all_gather(ranks, values, milliseconds_of(timeout),
                                          &InterruptScope::interrupted);
        });
      },
      py::arg("group"), py::arg("values"), py::arg("timeout"),
      "Every rank's numbers, by rank of the group. All ranks give equally many.");

  py::class_<StoreExchange, ExchangeHolder>(module, "StoreExchange",
                                            "Exchanges texts between processes.")
      .def(py::init([](const py::object& group, int rank) {
             c10d::ProcessGroup& ranks = process_group(group);
             const py::gil_scoped_release unlocked;
             return ExchangeHolder(
                 process_group_exchange(ranks, Rank(rank), &InterruptScope::interrupted).release());
           }),
           py::arg("group"), py::arg("rank"))
      .def(
          "all_gather",
          [](StoreExchange& exchange, const std::string& text, double timeout) {
            return interruptible(
                [&] { return exchange.all_gather(text, milliseconds_of(timeout)); });
          },
          py::arg("text"), py::arg("timeout"));
}

}  // namespace

void bind_comm(py::module_& module) {
  bind_transport(module);
  bind_loopback(module);
  bind_process_group(module);
}

}  // namespace dualpipe
