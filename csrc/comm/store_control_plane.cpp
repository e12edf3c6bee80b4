#include "comm/store_control_plane.h"

#include <algorithm>
#include <atomic>
#include <sstream>
#include <thread>
#include <utility>

#include "common/error.h"

namespace dualpipe {
namespace {

constexpr std::chrono::milliseconds kFirstPause{1};
constexpr std::chrono::milliseconds kLongestPause{20};

constexpr const char* kComplete = "complete";  // the outcome of an exchange that did not fail

std::string outcome_key(std::int64_t round) { return cat("exchange/", round, "/outcome"); }

std::string encode(const Failure& failure) {
  return cat(failure.rank, ' ', failure.step, ' ', failure.text);
}

Failure decode(const std::string& encoded) {
  std::istringstream in(encoded);
  std::int32_t rank = -1;
  Failure failure;
  in >> rank >> failure.step;
  in.ignore();
  failure.rank = Rank(rank);
  std::getline(in, failure.text, '\0');
  return failure;
}

// Ignores NoAnswer: what is written arrives later, and waiting for other ranks has its own time
// limit.
template <typename Call>
void unless_silent(const Call& call) try {
  call();
} catch (const NoAnswer&) {
}

class StoreControlPlane final : public ControlPlane {
 public:
  StoreControlPlane(std::unique_ptr<KeyValueStore> store, Rank rank, int num_ranks)
      : store_(std::move(store)), rank_(rank), num_ranks_(num_ranks) {}

  void report(const Failure& failure) override {
    unless_silent([&] { store_->set_first(failure_key(), encode(failure)); });
  }

  std::optional<Failure> poll() override {
    const std::string key = failure_key();
    std::optional<Failure> found;
    unless_silent([&] {
      if (store_->has({key})) found = decode(store_->get(key));
    });
    return found;
  }

  void publish_position(const std::string& position) override {
    unless_silent([&] { store_->set(position_key(rank_.value()), position); });
  }

  std::vector<std::string> positions() override {
    std::vector<std::string> texts(static_cast<std::size_t>(num_ranks_));
    unless_silent([&] {
      for (int rank = 0; rank < num_ranks_; ++rank) {
        const std::string key = position_key(rank);
        if (store_->has({key})) texts[static_cast<std::size_t>(rank)] = store_->get(key);
      }
    });
    return texts;
  }

  void advance_epoch() override { ++epoch_; }

 private:
  std::string failure_key() const { return cat("failure/", epoch_.load()); }
  std::string position_key(int rank) const { return cat("position/", epoch_.load(), "/", rank); }

  const std::unique_ptr<KeyValueStore> store_;
  const Rank rank_;
  const int num_ranks_;
  std::atomic<std::uint64_t> epoch_{0};
};

}  // namespace

std::unique_ptr<ControlPlane> store_control_plane(std::unique_ptr<KeyValueStore> store, Rank rank,
                                                  int num_ranks) {
  return std::make_unique<StoreControlPlane>(std::move(store), rank, num_ranks);
}

std::string StoreExchange::key(std::int64_t round, int rank) const {
  return cat("exchange/", round, "/", rank);
}

std::vector<std::string> StoreExchange::all_gather(const std::string& text,
                                                   std::chrono::milliseconds timeout) {
  const Clock::time_point deadline = Clock::now() + timeout;
  const std::int64_t round = store_->add(cat("exchanges/", rank_), 1);
  unless_silent([&] { store_->set(key(round, rank_.value()), text); });
  // One outcome for all: a late rank finds the one that the others agreed on.
  const std::string own = await(round, timeout, deadline);
  unless_silent([&] { store_->set_first(outcome_key(round), own); });
  const std::string outcome = get(outcome_key(round), deadline);
  if (outcome != kComplete) throw PipelineError(outcome);
  std::vector<std::string> texts;
  for (int rank = 0; rank < num_ranks_; ++rank) texts.push_back(get(key(round, rank), deadline));
  // Every rank is in this round, so every rank has read the one before.
  unless_silent([&] {
    if (round > 1) store_->remove(key(round - 1, rank_.value()));
    if (round > 1 && rank_.value() == 0) store_->remove(outcome_key(round - 1));
  });
  return texts;
}

// The key must exist.
std::string StoreExchange::get(const std::string& key, Clock::time_point deadline) {
  for (;;) {
    try {
      return store_->get(key);
    } catch (const NoAnswer&) {
      if (Clock::now() >= deadline || interrupted_()) throw;
    }
  }
}

// The outcome of the round as this rank sees it.
std::string StoreExchange::await(std::int64_t round, std::chrono::milliseconds timeout,
                                 Clock::time_point deadline) {
  for (auto pause = kFirstPause;; pause = std::min(2 * pause, kLongestPause)) {
    const bool is_late = Clock::now() >= deadline;
    std::string ranks;
    bool is_over = false;
    try {
      ranks = missing(round);
      if (ranks.empty()) return kComplete;
      is_over = store_->has({outcome_key(round)});
    } catch (const NoAnswer&) {
      if (is_late) throw;
    }
    if (interrupted_()) return cat("rank ", rank_, " was interrupted (Ctrl-C)");
    if (is_late || is_over) {
      return cat("rank ", rank_, " waited ", static_cast<double>(timeout.count()) / 1000,
                 " s for rank(s) ", ranks, " of ", num_ranks_,
                 ": start all ranks, or allow more time");
    }
    std::this_thread::sleep_for(pause);
  }
}

std::string StoreExchange::missing(std::int64_t round) {
  std::vector<std::string> keys;
  for (int rank = 0; rank < num_ranks_; ++rank) keys.push_back(key(round, rank));
  if (store_->has(keys)) return {};
  std::string ranks;
  for (int rank = 0; rank < num_ranks_; ++rank) {
    const bool is_here = store_->has({keys[static_cast<std::size_t>(rank)]});
    if (!is_here) ranks += cat(ranks.empty() ? "" : ", ", rank);
  }
  return ranks;
}

}  // namespace dualpipe
