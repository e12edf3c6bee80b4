// What the executor costs beside the waits for messages: stages that do nothing, ranks that are
// threads, loopback. For each rank and step
//
//   busy = (step - waits for messages - wait for the commit) / actions
//   cpu  = processor time of the rank's thread / actions, what the waits cost included
//
// where actions are all instructions of the rank's program: computations, sends, receives. On a
// machine with fewer idle cores than ranks, busy contains the time in which the thread was not
// scheduled; cpu does not. Printed: the median over steps and ranks, in microseconds.
//
//   bench_executor [--ranks 2,4] [--microbatches 64] [--steps 200] [--planner dualpipe] [--json]

#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "comm/loopback.h"
#include "common/error.h"
#include "engine/engine.h"
#include "schedule/passes/passes.h"
#include "schedule/planners/planners.h"

namespace dualpipe {
namespace {

struct Options {
  std::vector<int> ranks = {2, 4};
  int num_microbatches = 64;
  int num_steps = 200;
  std::string planner = "dualpipe";
  bool json = false;
};

// Hands over one tensor of 64 bytes and computes nothing.
class IdleStages final : public StageRunner {
 public:
  Message forward(Stage, Microbatch, Message) override { return message_; }
  Message backward(Stage, Microbatch, Message, bool) override { return message_; }
  void backward_weight(Stage, Microbatch, const WeightsAdvanced&) override {}
  std::pair<Message, Message> overlapped(Half, Half) override { return {message_, message_}; }
  [[nodiscard]] int peak_live() const override { return 0; }

 private:
  static Message make(std::byte* data) {
    TensorSpec spec;
    spec.dtype = 0;
    spec.num_dims = 1;
    spec.shape[0] = 64;
    spec.num_bytes = 64;
    return {{spec}, {data}, nullptr};
  }

  std::byte data_[64] = {};
  Message message_ = make(data_);
};

// Passes everything on and takes the time of the commit.
class TimedCommit final : public Transport {
 public:
  TimedCommit(std::unique_ptr<Transport> inner, std::int64_t& commit_ns)
      : inner_(std::move(inner)), commit_ns_(commit_ns) {}
  void begin_step(const StepInfo& info) override { inner_->begin_step(info); }
  EventPtr send(Rank to, const MessageId& id, Message message, const EventPtr& ready) override {
    return inner_->send(to, id, std::move(message), ready);
  }
  std::unique_ptr<PendingReceive> receive(Rank from, const MessageId& id) override {
    return inner_->receive(from, id);
  }
  void end_step() override {
    const std::int64_t start = now_ns();
    inner_->end_step();
    commit_ns_ = now_ns() - start;
  }
  void abort(const Failure& failure) noexcept override { inner_->abort(failure); }
  void recover() override { inner_->recover(); }

 private:
  std::unique_ptr<Transport> inner_;
  std::int64_t& commit_ns_;
};

std::int64_t thread_cpu_ns() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return time.tv_sec * 1'000'000'000LL + time.tv_nsec;
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

// Microseconds an action, of each step of one rank.
struct RankTimes {
  std::vector<double> busy, wait, commit, cpu, step;
};

RankTimes run_rank(Rank rank, LoopbackHub& hub, const Schedule& lowered, int num_steps) {
  constexpr int kWarmUp = 20;
  std::int64_t commit_ns = 0;
  Engine engine(rank, std::make_unique<TimedCommit>(hub.transport(rank), commit_ns),
                hub.control_plane(rank), Watchdog::Options{});
  const Program program = make_program(lowered, rank, "a benchmark");
  const double scale = 1e-3 / static_cast<double>(program.instructions.size());
  IdleStages stages;
  RankTimes times;
  for (int step = -kWarmUp; step < num_steps; ++step) {
    const std::int64_t cpu = thread_cpu_ns();
    const std::int64_t start = now_ns();
    engine.run(program, stages, nullptr);
    const std::int64_t step_ns = now_ns() - start;
    const std::int64_t cpu_ns = thread_cpu_ns() - cpu;
    if (step < 0) continue;
    std::int64_t wait_ns = 0;
    for (const TraceEvent& event : engine.trace().events) wait_ns += event.wait_ns;
    times.busy.push_back(scale * static_cast<double>(step_ns - wait_ns - commit_ns));
    times.wait.push_back(scale * static_cast<double>(wait_ns));
    times.commit.push_back(scale * static_cast<double>(commit_ns));
    times.cpu.push_back(scale * static_cast<double>(cpu_ns));
    times.step.push_back(scale * static_cast<double>(step_ns));
  }
  return times;
}

void append(std::vector<double>& all, const std::vector<double>& some) {
  all.insert(all.end(), some.begin(), some.end());
}

RankTimes run(int num_ranks, const Options& options) {
  const Schedule lowered = lower(plan(options.planner, {num_ranks, options.num_microbatches}), {});
  const auto hub = LoopbackHub::create(num_ranks);
  std::vector<RankTimes> by_rank(static_cast<std::size_t>(num_ranks));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < num_ranks; ++rank) {
    threads.emplace_back([&, rank] {
      by_rank[static_cast<std::size_t>(rank)] =
          run_rank(Rank(rank), *hub, lowered, options.num_steps);
    });
  }
  for (std::thread& thread : threads) thread.join();
  RankTimes all;
  for (const RankTimes& times : by_rank) {
    append(all.busy, times.busy);
    append(all.wait, times.wait);
    append(all.commit, times.commit);
    append(all.cpu, times.cpu);
    append(all.step, times.step);
  }
  return all;
}

void print(int num_ranks, const Options& options, const RankTimes& times) {
  const char* const format =
      options.json
          ? "{\"planner\": \"%s\", \"ranks\": %d, \"microbatches\": %d, \"busy_us\": %.3f, "
            "\"cpu_us\": %.3f, \"wait_us\": %.3f, \"commit_us\": %.3f, \"step_us\": %.3f}\n"
          : "%s, P=%d, N=%d, an action: busy %.3f us, cpu %.3f us, wait %.3f us, commit %.3f us, "
            "step %.3f us\n";
  std::printf(format, options.planner.c_str(), num_ranks, options.num_microbatches,
              median(times.busy), median(times.cpu), median(times.wait), median(times.commit),
              median(times.step));
}

std::vector<int> parse_list(const std::string& text) {
  std::vector<int> values;
  std::size_t start = 0;
  while (start < text.size()) {
    const std::size_t comma = std::min(text.find(',', start), text.size());
    values.push_back(std::stoi(text.substr(start, comma - start)));
    start = comma + 1;
  }
  return values;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view name = argv[i];
    if (name == "--json") {
      options.json = true;
      continue;
    }
    DUALPIPE_USER_CHECK(i + 1 < argc, name, " needs a value");
    const std::string value = argv[++i];
    if (name == "--ranks") {
      options.ranks = parse_list(value);
    } else if (name == "--microbatches") {
      options.num_microbatches = std::stoi(value);
    } else if (name == "--steps") {
      options.num_steps = std::stoi(value);
    } else if (name == "--planner") {
      options.planner = value;
    } else {
      throw UserError(cat("unknown option ", name,
                          "; known: --ranks, --microbatches, --steps, --planner, --json"));
    }
  }
  DUALPIPE_USER_CHECK(options.num_steps >= 1, "--steps must be at least 1");
  return options;
}

}  // namespace
}  // namespace dualpipe

int main(int argc, char** argv) {
  try {
    const dualpipe::Options options = dualpipe::parse(argc, argv);
    for (const int num_ranks : options.ranks) {
      dualpipe::print(num_ranks, options, dualpipe::run(num_ranks, options));
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_executor: %s\n", error.what());
    return EXIT_FAILURE;
  }
}
