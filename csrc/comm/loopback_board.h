#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "comm/control_plane.h"
#include "comm/loopback_mailbox.h"

namespace dualpipe::loopback {

// Compares the steps that ranks announce, and lets the ranks meet. Steps are numbered from 0 within
// an epoch, meetings from 0 within a step. Thread-safe.
class StepBoard {
 public:
  explicit StepBoard(int num_ranks) : num_ranks_(num_ranks) {}

  struct Place {
    std::uint64_t epoch = 0;
    std::uint64_t step = 0;
    std::uint64_t meeting = 0;
    auto operator<=>(const Place&) const = default;
  };

  // Describes the mismatch if another rank has announced something else for this place.
  [[nodiscard]] std::optional<std::string> announce(Rank rank, const Place& place,
                                                    const StepInfo& info);

  // Returns the extremes of all ranks' values once all have called it for this place; throws the
  // failure in `failure`, in which case no rank returns.
  [[nodiscard]] HostTransport::Extremes meet(const Place& place, std::uint64_t value,
                                             const FailureFlag& failure);

  void wake();

 private:
  const int num_ranks_;
  std::mutex mutex_;
  std::condition_variable cv_;
  std::optional<Place> announced_place_;
  Rank announced_by_;
  StepInfo announced_;
  Place meeting_;
  int num_arrived_ = 0;
  HostTransport::Extremes arrived_{};
  std::optional<Place> met_;
  HostTransport::Extremes result_{};  // of met_; valid for late ranks, which have not met again
};

// What the control planes of all ranks share: failures and positions by epoch, and the exchange of
// texts. Thread-safe.
class FailureBoard {
 public:
  explicit FailureBoard(int num_ranks);

  void report(Rank rank, const Failure& failure);
  [[nodiscard]] std::optional<Failure> poll(Rank rank);
  void publish_position(Rank rank, const std::string& position);
  [[nodiscard]] std::vector<std::string> positions(Rank rank);
  void advance_epoch(Rank rank);
  [[nodiscard]] std::vector<std::string> all_gather(Rank rank, const std::string& text,
                                                    std::chrono::milliseconds timeout);

 private:
  struct Round {
    std::vector<std::optional<std::string>> texts;
    int num_present = 0;
    int num_left = 0;
    std::string failure;  // why it failed; empty: it has not
  };
  struct Position {
    std::uint64_t epoch = 0;
    std::string text;
  };

  [[nodiscard]] const Failure* failure_of(std::uint64_t epoch) const;
  [[nodiscard]] std::string missing(const Round& round) const;

  const std::size_t num_ranks_;
  std::mutex mutex_;
  std::condition_variable cv_;
  std::vector<std::uint64_t> epochs_;  // by rank
  std::map<std::uint64_t, Failure> failures_;
  std::vector<Position> positions_;
  std::vector<std::uint64_t> rounds_of_;  // by rank: how many exchanges it took part in
  std::map<std::uint64_t, Round> rounds_;
};

}  // namespace dualpipe::loopback
