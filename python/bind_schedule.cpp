#include <pybind11/stl.h>

#include <tuple>
#include <variant>

#include "bindings.h"
#include "schedule/grid.h"
#include "schedule/passes/passes.h"
#include "schedule/planners/planners.h"
#include "schedule/sim/simulate.h"
#include "schedule/verify/verify.h"

namespace py = pybind11;
using namespace py::literals;

namespace dualpipe {
namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;

Rank rank_in(std::size_t num_ranks, int rank) {
  if (rank >= 0 && static_cast<std::size_t>(rank) < num_ranks) return Rank(rank);
  throw UserError(cat("rank is ", rank, "; it must be in 0..", num_ranks - 1));
}

std::vector<std::string> actions_of(const Schedule& schedule, int rank) {
  std::vector<std::string> texts;
  for (const Action& action : schedule.row(rank_in(schedule.rows.size(), rank))) {
    texts.push_back(to_string(action));
  }
  return texts;
}

std::vector<int> stages_of(const Schedule& schedule, int rank) {
  std::vector<int> stages;
  for (Stage stage : schedule.placement.stages_of(rank_in(schedule.rows.size(), rank))) {
    stages.push_back(stage.value());
  }
  return stages;
}

std::vector<int> microbatches_at(const Schedule& schedule, int stage, int rank) {
  const Rank wanted = rank_in(schedule.rows.size(), rank);
  std::vector<int> found;
  for (int i = 0; i < schedule.num_microbatches(); ++i) {
    if (schedule.placement.rank_of(Stage(stage), Microbatch(i)) == wanted) found.push_back(i);
  }
  return found;
}

std::optional<int> mirror_of(const Schedule& schedule, int rank) {
  const Rank mirror = schedule.placement.mirror_of(rank_in(schedule.rows.size(), rank));
  return mirror.valid() ? std::optional<int>(mirror.value()) : std::nullopt;
}

std::string grid_of(const Schedule& schedule, std::optional<int> rank, int step) {
  if (!rank) return to_grid(schedule, whole(schedule));
  return to_grid(schedule, around(schedule, rank_in(schedule.rows.size(), *rank), step));
}

Schedule lowered(const Schedule& schedule, bool keep_overlap, bool with_backward,
                 bool reduce_gradients, int lookahead) {
  return lower(schedule, {keep_overlap, with_backward, reduce_gradients, lookahead});
}

void verify_or_throw(const Schedule& schedule) { throw_if_any(schedule, verify(schedule)); }

std::vector<std::tuple<int, int, std::string>> diagnostics_of(const Schedule& schedule) {
  std::vector<std::tuple<int, int, std::string>> out;
  for (const Diagnostic& found : verify(schedule)) {
    out.emplace_back(found.rank.value(), found.step, found.text);
  }
  return out;
}

std::vector<std::tuple<std::string, double, double>> spans_of(const Timeline& timeline, int rank) {
  std::vector<std::tuple<std::string, double, double>> out;
  for (const Span& span : timeline.ranks[rank_in(timeline.ranks.size(), rank).index()]) {
    out.emplace_back(to_string(span.action), span.start, span.end);
  }
  return out;
}

using OneOrEach = std::variant<double, std::vector<double>>;

StageTimes stage_times(OneOrEach costs) {
  return std::visit([](auto&& own) { return StageTimes(std::move(own)); }, std::move(costs));
}

CostModel cost_model(OneOrEach forward, OneOrEach backward_input, OneOrEach backward_weight,
                     std::optional<double> overlapped, double latency, double message_time) {
  return {stage_times(std::move(forward)),
          stage_times(std::move(backward_input)),
          stage_times(std::move(backward_weight)),
          overlapped,
          latency,
          message_time};
}

using Part = std::tuple<std::string, int, std::optional<int>>;

std::vector<Part> parts_of(const std::string& text) {
  std::vector<Part> parts;
  for_each_part(parse_action(text), [&](const Action& part) {
    const Microbatch microbatch = part.microbatch();
    parts.emplace_back(op_name(part.op()), part.stage().value(),
                       microbatch.valid() ? std::optional(microbatch.value()) : std::nullopt);
  });
  return parts;
}

void bind_planners(py::module_& module) {
  py::class_<PlannerInfo>(module, "PlannerInfo", "A built-in planner.")
      .def_property_readonly("name", [](const PlannerInfo& info) { return info.name; })
      .def_property_readonly("placement",
                             [](const PlannerInfo& info) { return to_string(info.placement); })
      .def_readonly("stages_per_rank", &PlannerInfo::stages_per_rank, "0: any.")
      .def_property_readonly("summary", [](const PlannerInfo& info) { return info.summary; });
  module.def("planners", &planners, "All built-in planners.");
  module.def(
      "plan_schedule",
      [](const std::string& name, int num_ranks, int num_microbatches, int stages_per_rank) {
        return plan(name, {num_ranks, num_microbatches, stages_per_rank});
      },
      "name"_a, "num_ranks"_a, "num_microbatches"_a, "stages_per_rank"_a = 0, Unlocked(),
      "A verified schedule of compute actions.");
  module.def(
      "schedule_from_csv",
      [](const std::string& text, const std::string& placement, int num_stages) {
        return schedule_from_csv(text, parse_placement_kind(placement), num_stages);
      },
      "text"_a, "placement"_a, "num_stages"_a, Unlocked(),
      "Parses the CSV of torch.distributed.pipelining; verifies nothing.");
  module.def("parse_action", &parts_of, "text"_a,
             "(operation, stage, micro-batch) of an action, or of both halves of a pair.");
}

void bind_schedule_class(py::module_& module) {
  py::class_<Schedule>(module, "Schedule", "What every rank does, in order, as data.")
      .def_readwrite("name", &Schedule::name)
      .def_property_readonly(
          "placement",
          [](const Schedule& schedule) { return to_string(schedule.placement.kind()); })
      .def_property_readonly("num_ranks", &Schedule::num_ranks)
      .def_property_readonly("num_stages", &Schedule::num_stages)
      .def_property_readonly("num_microbatches", &Schedule::num_microbatches)
      .def("actions", &actions_of, "rank"_a)
      .def("stages_of", &stages_of, "rank"_a)
      .def("mirror_of", &mirror_of, "rank"_a)
      .def("microbatches_at", &microbatches_at, "stage"_a, "rank"_a)
      .def("digest", &digest, Unlocked())
      .def("to_csv", &to_csv, Unlocked())
      .def("grid", &grid_of, "rank"_a = py::none(), "step"_a = -1)
      .def("lower", &lowered, py::kw_only(), "keep_overlap"_a, "with_backward"_a,
           "reduce_gradients"_a, "lookahead"_a, Unlocked())
      .def("verify", &verify_or_throw, Unlocked())
      .def("diagnostics", &diagnostics_of, Unlocked())
      .def(
          "peak_activations",
          [](const Schedule& schedule, int rank) {
            return peak_live_activations(schedule, rank_in(schedule.rows.size(), rank));
          },
          "rank"_a)
      .def("simulate", &simulate, "costs"_a, "sends"_a, Unlocked())
      .def(
          "__eq__", [](const Schedule& a, const Schedule& b) { return a == b; }, py::is_operator());
}

void bind_simulator(py::module_& module) {
  py::class_<CostModel>(module, "CostModel", "Durations in any one unit of time.")
      .def(py::init(&cost_model), py::kw_only(), "forward"_a, "backward_input"_a,
           "backward_weight"_a, "overlapped"_a, "latency"_a, "message_time"_a);
  py::enum_<Sends>(module, "Sends", "When results leave.")
      .value("EARLY", Sends::kEarly)
      .value("LATE", Sends::kLate);
  py::class_<Timeline>(module, "Timeline", "What ran when, by rank.")
      .def_readonly("makespan", &Timeline::makespan)
      .def_property_readonly("num_ranks",
                             [](const Timeline& timeline) { return timeline.ranks.size(); })
      .def("spans", &spans_of, "rank"_a)
      .def(
          "busy",
          [](const Timeline& timeline, int rank) {
            return timeline.busy(rank_in(timeline.ranks.size(), rank));
          },
          "rank"_a)
      .def(
          "bubble",
          [](const Timeline& timeline, int rank) {
            return timeline.bubble(rank_in(timeline.ranks.size(), rank));
          },
          "rank"_a)
      .def(
          "peak_activations",
          [](const Timeline& timeline, int rank) {
            return timeline.peak_activations(rank_in(timeline.ranks.size(), rank));
          },
          "rank"_a)
      .def("grid", py::overload_cast<const Timeline&, double>(&to_grid), "unit"_a)
      .def("to_chrome_trace", &to_chrome_trace, "microseconds_per_unit"_a);
}

}  // namespace

// Classes are bound before what returns them, so that signatures name them.
void bind_schedule(py::module_& module) {
  bind_simulator(module);
  bind_schedule_class(module);
  bind_planners(module);
}

}  // namespace dualpipe
