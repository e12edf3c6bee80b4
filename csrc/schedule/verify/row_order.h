#pragma once

#include <cstdint>
#include <vector>

#include "schedule/schedule.h"
#include "schedule/verify/findings.h"

namespace dualpipe {

enum class Form : std::uint8_t {
  kCompute,  // only compute actions: inputs from other ranks count as present
  kLowered,  // with explicit messages: inputs from other ranks need an earlier RECV
};

// What has been done for a (stage, micro-batch).
enum Done : std::uint8_t {
  kDidForward = 1,
  kDidInput = 2,
  kDidWeight = 4,
  kSentForward = 8,
  kSentBackward = 16,
  kAskedForward = 32,
  kAskedBackward = 64,
};

// Checks each row by itself: every action names a valid stage and micro-batch, is on the right
// rank, occurs once, and comes after what it needs from the same rank; no action is missing.
class RowOrder {
 public:
  RowOrder(const Schedule& schedule, Form form, Findings& findings);

  void check_rows();
  void check_complete();

 private:
  void check_row(Rank rank);
  void check_action(const Action& action);
  bool check_place(const Action& part);
  void check_part(const Action& part);
  void check_forward(const Action& part);
  void check_backward(const Action& part);
  void check_weight(const Action& part);
  void check_message(const Action& part);
  void check_reduce(const Action& action);
  void require_input(const Action& part, std::uint8_t receive_bit, std::uint8_t producer_bit,
                     int producer_stage);
  void mark(const Action& part);
  void check_cell_complete(Stage stage, Microbatch microbatch);
  [[nodiscard]] int needed(Stage stage, Microbatch microbatch) const;

  [[nodiscard]] std::uint8_t& done(Stage stage, Microbatch microbatch) {
    return done_[placement_.cell(stage, microbatch)];
  }
  void report(const std::string& text);

  const Schedule& schedule_;
  const Placement placement_;
  const Form form_;
  Findings& findings_;
  std::vector<std::uint8_t> done_;     // by cell: bits of what has been done
  std::vector<std::int32_t> reduced_;  // by stage: the last rank that reduced it, -1: none
  bool has_backward_ = false;
  Rank rank_;
  std::size_t step_ = 0;
};

}  // namespace dualpipe
