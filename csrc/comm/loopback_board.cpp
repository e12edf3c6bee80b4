#include "comm/loopback_board.h"

#include <algorithm>

#include "common/error.h"

namespace dualpipe::loopback {

std::optional<std::string> StepBoard::announce(Rank rank, const Place& place,
                                               const StepInfo& info) {
  const std::lock_guard lock(mutex_);
  if (!announced_place_ || *announced_place_ < place) {
    announced_place_ = place;
    announced_by_ = rank;
    announced_ = info;
  }
  if (*announced_place_ != place || same_step(announced_, info)) return std::nullopt;
  return describe_mismatch(announced_by_, announced_, rank, info);
}

HostTransport::Extremes StepBoard::meet(const Place& place, std::uint64_t value,
                                        const FailureFlag& failure) {
  std::unique_lock lock(mutex_);
  failure.throw_if_set();
  if (meeting_ < place) {
    meeting_ = place;
    num_arrived_ = 0;
    arrived_ = {};
  }
  // Another rank has already recovered and moved on: this meeting can no longer take place.
  const bool too_late = place < meeting_;
  if (!too_late) arrived_ = HostTransport::merged(arrived_, {value, value});
  if (!too_late && ++num_arrived_ == num_ranks_) {
    met_ = place;
    result_ = arrived_;
    cv_.notify_all();
    return result_;
  }
  cv_.wait(lock, [&] { return (met_ && *met_ >= place) || failure.is_set(); });
  if (met_ && *met_ >= place) return result_;
  if (meeting_ == place) num_arrived_ = -num_ranks_;  // this rank fails: no rank may complete it
  failure.throw_if_set();
  return {};
}

void StepBoard::wake() {
  { const std::lock_guard lock(mutex_); }
  cv_.notify_all();
}

FailureBoard::FailureBoard(int num_ranks)
    : num_ranks_(static_cast<std::size_t>(num_ranks)),
      epochs_(num_ranks_, 0),
      positions_(num_ranks_),
      rounds_of_(num_ranks_, 0) {}

void FailureBoard::report(Rank rank, const Failure& failure) {
  {
    const std::lock_guard lock(mutex_);
    failures_.try_emplace(epochs_[rank.index()], failure);
  }
  cv_.notify_all();
}

std::optional<Failure> FailureBoard::poll(Rank rank) {
  const std::lock_guard lock(mutex_);
  const Failure* failure = failure_of(epochs_[rank.index()]);
  return failure != nullptr ? std::optional(*failure) : std::nullopt;
}

void FailureBoard::publish_position(Rank rank, const std::string& position) {
  const std::lock_guard lock(mutex_);
  positions_[rank.index()] = {epochs_[rank.index()], position};
}

std::vector<std::string> FailureBoard::positions(Rank rank) {
  const std::lock_guard lock(mutex_);
  std::vector<std::string> texts;
  for (const Position& position : positions_) {
    const bool current = position.epoch == epochs_[rank.index()];
    texts.push_back(current ? position.text : std::string());
  }
  return texts;
}

void FailureBoard::advance_epoch(Rank rank) {
  const std::lock_guard lock(mutex_);
  ++epochs_[rank.index()];
  failures_.erase(failures_.begin(),
                  failures_.lower_bound(*std::min_element(epochs_.begin(), epochs_.end())));
}

const Failure* FailureBoard::failure_of(std::uint64_t epoch) const {
  const auto found = failures_.find(epoch);
  return found != failures_.end() ? &found->second : nullptr;
}

std::string FailureBoard::missing(const Round& round) const {
  std::string ranks;
  for (std::size_t rank = 0; rank < num_ranks_; ++rank) {
    if (!round.texts[rank]) ranks += cat(ranks.empty() ? "" : ", ", rank);
  }
  return ranks;
}

std::vector<std::string> FailureBoard::all_gather(Rank rank, const std::string& text,
                                                  std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  const std::uint64_t number = rounds_of_[rank.index()]++;
  Round& round = rounds_[number];
  round.texts.resize(num_ranks_);
  round.texts[rank.index()] = text;
  ++round.num_present;
  cv_.notify_all();

  const auto complete = [&] { return round.num_present == static_cast<int>(num_ranks_); };
  const auto failure = [&] { return failure_of(epochs_[rank.index()]); };
  cv_.wait_for(lock, timeout,
               [&] { return complete() || failure() != nullptr || !round.failure.empty(); });
  if (round.failure.empty() && !complete()) {
    round.failure = failure() != nullptr ? failure()->text
                                         : cat("rank ", rank, " waited ",
                                               static_cast<double>(timeout.count()) / 1000,
                                               " s for rank(s) ", missing(round), " of ",
                                               num_ranks_, ": start all ranks, or allow more time");
    cv_.notify_all();
  }
  const std::string why = round.failure;
  std::vector<std::string> texts;
  for (const auto& one : round.texts) texts.push_back(one.value_or(""));
  if (++round.num_left == static_cast<int>(num_ranks_)) rounds_.erase(number);
  if (!why.empty()) throw PipelineError(why);
  return texts;
}

}  // namespace dualpipe::loopback
