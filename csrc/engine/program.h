#pragma once

#include <compare>
#include <cstdint>
#include <string>
#include <vector>

#include "comm/transport.h"
#include "schedule/schedule.h"

namespace dualpipe {

// Where a computation takes its data from.
enum class Source : std::uint8_t {
  kRunner,   // the step's own inputs or losses: first stages forward, last stages backward
  kReceive,  // the program's receive number `index`
  kSlot,     // the slot `index`, filled by another stage of this rank
};

// One forward or backward, resolved: what it reads, and where its result is left.
struct Computation {
  Action action;
  Source source = Source::kRunner;
  int index = -1;
  int result_slot = -1;  // -1: nobody needs it
};

struct Instruction {
  Action action;                // as in the schedule
  Computation first;            // F, B, I, or the forward half of a pair
  Computation second;           // the backward half of a pair
  Rank peer;                    // sends and receives
  MessageId message{};          // sends and receives
  int index = -1;               // a send's slot, a receive's number
  bool is_last_weight = false;  // a W after which its stage's gradients are final
};

// One rank's lowered schedule with everything resolved. Immutable; shared by all steps that run it.
struct Program {
  Rank rank;
  std::vector<Instruction> instructions;
  std::vector<int> receives;  // by receive number: the index of its instruction
  int num_slots = 0;
  int planned_peak_activations = 0;
  std::uint64_t digest = 0;  // of the whole schedule: equal on all ranks
  std::string description;
};

// The ways by which a program sends and receives, sorted.
[[nodiscard]] std::vector<MessageWay> message_ways(const Program& program);

// description: for people, in the errors of ranks that disagree. The schedule must have been
// verified.
[[nodiscard]] Program make_program(const Schedule& lowered, Rank rank, std::string description);

// A step that only reduces gradients: those of the given stages, which the rank holds. Ranks whose
// descriptions differ disagree, as ranks with different schedules do.
[[nodiscard]] Program make_reduce_program(Rank rank, const std::vector<Stage>& stages,
                                          std::string description);

}  // namespace dualpipe
