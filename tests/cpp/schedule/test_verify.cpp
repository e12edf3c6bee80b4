#include <algorithm>
#include <random>

#include "helpers.h"

namespace dualpipe {
namespace {

using test::find;
using test::joined;
using test::make;
using test::row_of;

constexpr auto kLoop = PlacementKind::kLoop;

void expect_found(const std::vector<Diagnostic>& diagnostics, int rank, std::string_view part) {
  for (const Diagnostic& found : diagnostics) {
    if (found.rank == Rank(rank) && found.text.find(part) != std::string::npos) return;
  }
  ADD_FAILURE() << "nothing about \"" << part << "\" on rank " << rank << " in:\n"
                << joined(diagnostics);
}

TEST(Verify, EveryLoweringOfEveryPlanIsProved) {
  test::for_each_plan(8, [](const Schedule& schedule) {
    for (int lookahead : {0, 1, 2, 5}) {
      for (bool keep : {false, true}) {
        for (bool backward : {false, true}) {
          const Schedule lowered = lower(schedule, {.keep_overlap = keep,
                                                    .with_backward = backward,
                                                    .reduce_gradients = true,
                                                    .lookahead = lookahead});
          EXPECT_EQ(joined(verify_lowered(lowered)), "") << schedule.name;
        }
      }
    }
  });
}

TEST(Verify, FindsADroppedAction) {
  Schedule schedule = plan("dualpipe", {4, 8, 0});
  auto& row = row_of(schedule, 2);
  row.erase(row.begin() + static_cast<std::ptrdiff_t>(find(schedule, 2, "1W7")));
  expect_found(verify_compute(schedule), 2, "1W7 is missing");
}

TEST(Verify, FindsADuplicate) {
  Schedule schedule = plan("dualpipe", {4, 8, 0});
  row_of(schedule, 0).insert(row_of(schedule, 0).begin(), parse_action("0F1"));
  expect_found(verify_compute(schedule), 0, "0F1 is done twice");
  schedule = plan("dualpipe", {4, 8, 0});
  row_of(schedule, 0).push_back(parse_action("0W3"));
  expect_found(verify_compute(schedule), 0, "0W3 is done twice");
  schedule = make(kLoop, 1, {"0F0 0B0 0I0"});
  expect_found(verify_compute(schedule), 0, "0I0 is done twice");
}

TEST(Verify, FindsAnActionOnTheWrongRank) {
  Schedule schedule = plan("dualpipe", {4, 8, 0});
  std::swap(row_of(schedule, 0)[0], row_of(schedule, 3)[0]);
  expect_found(verify_compute(schedule), 0, "0F4 belongs on rank 3");
  expect_found(verify_compute(schedule), 3, "0F0 belongs on rank 0");
}

TEST(Verify, FindsBrokenOrderOnARank) {
  expect_found(verify_compute(make(kLoop, 1, {"0B0 0F0"})), 0, "0B0 comes before 0F0");
  expect_found(verify_compute(make(kLoop, 1, {"0F0 0W0 0I0"})), 0, "0W0 comes before 0I0");
  expect_found(verify_compute(make(kLoop, 2, {"1F0 0F0 1B0 0B0"})), 0, "1F0 comes before 0F0");
  expect_found(verify_compute(make(kLoop, 2, {"0F0 1F0 0B0 1B0"})), 0, "0B0 comes before 1B0");
  expect_found(verify_compute(make(kLoop, 1, {"(0F0;0B0)OVERLAP_F_B"})), 0, "comes before 0F0");
}

TEST(Verify, FindsACycleBetweenRanks) {
  const Schedule schedule = make(kLoop, 2, {"0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"});
  const auto found = verify_compute(schedule);
  expect_found(found, 0, "0B0 waits for rank 1");
  expect_found(found, 1, "1F1 waits for rank 0");
  EXPECT_EQ(found[0].step, 1);
}

TEST(Verify, FindsNumbersOutOfRange) {
  Schedule schedule = make(kLoop, 2, {"0F0 0B0", "1F0 1B0"});
  row_of(schedule, 0).push_back(parse_action("2F0"));
  row_of(schedule, 1).push_back(parse_action("1F9"));
  row_of(schedule, 1).push_back(parse_action("5REDUCE_GRAD"));
  expect_found(verify_compute(schedule), 0, "names stage 2; stages are 0..1");
  expect_found(verify_compute(schedule), 1, "names micro-batch 9; micro-batches are 0..0");
  expect_found(verify_compute(schedule), 1, "names stage 5");
  schedule.rows.pop_back();
  expect_found(verify_compute(schedule), 0, "has 1 rows for 2 ranks");
}

TEST(Verify, TakesMessagesOnlyInALoweredSchedule) {
  const Schedule compute = make(kLoop, 2, {"0F0 0B0", "1F0 1B0"});
  const Schedule lowered = lower_communication(compute, 0);
  expect_found(verify_compute(lowered), 0, "is a message");
  expect_found(verify_lowered(compute), 1, "needs what 1RECV_F0 asks for");
  EXPECT_EQ(joined(verify(compute)), "");
  EXPECT_EQ(joined(verify(lowered)), "");
}

TEST(Verify, FindsMissingAndDoubledMessages) {
  const Schedule good = lower(plan("1f1b", {2, 4, 0}), {});
  for (const char* action : {"0SEND_F2", "0RECV_B2"}) {
    Schedule schedule = good;
    auto& row = row_of(schedule, 0);
    const auto at = row.begin() + static_cast<std::ptrdiff_t>(find(schedule, 0, action));
    row.insert(at, *at);
    expect_found(verify_lowered(schedule), 0, cat(action, " is there twice"));
    schedule = good;
    auto& other = row_of(schedule, 0);
    other.erase(other.begin() + static_cast<std::ptrdiff_t>(find(schedule, 0, action)));
    expect_found(verify_lowered(schedule), 0, action);
  }
}

TEST(Verify, FindsMessagesAtTheWrongTime) {
  expect_found(
      verify_lowered(make(kLoop, 2, {"0SEND_F0 0F0 0RECV_B0 0B0", "1RECV_F0 1F0 1B0 1SEND_B0"})), 0,
      "0SEND_F0 comes before the action that makes the data");
  expect_found(
      verify_lowered(make(kLoop, 2, {"0F0 0SEND_F0 0B0 0RECV_B0", "1RECV_F0 1F0 1B0 1SEND_B0"})), 0,
      "0RECV_B0 comes after the action that uses the data");
  expect_found(verify_lowered(make(kLoop, 1, {"0F0 0SEND_F0 0B0"})), 0,
               "no stage on the other side");
  expect_found(verify_lowered(make(kLoop, 2, {"0F0 0SEND_F0 1F0 1B0 0B0"})), 0,
               "stays on its rank");
}

TEST(Verify, FindsReceivesInAnotherOrderThanSends) {
  Schedule schedule = lower(plan("1f1b", {2, 4, 0}), {.lookahead = 3});
  auto& row = row_of(schedule, 1);
  std::swap(row[find(schedule, 1, "1RECV_F0")], row[find(schedule, 1, "1RECV_F1")]);
  ASSERT_EQ(test::text_of(schedule, 1).substr(0, 17), "1RECV_F1 1RECV_F0");
  expect_found(verify_lowered(schedule), 1,
               "1RECV_F1 is number 0 in its channel, but rank 0 sends");
}

// Rank 0 sends the second activation only after its first backward; rank 1 uses that activation
// before it sends the gradient that this backward needs.
TEST(Verify, FindsADeadlockOfMessages) {
  const Schedule schedule = make(kLoop, 2,
                                 {"0F0 0SEND_F0 0RECV_B0 0B0 0F1 0SEND_F1 0RECV_B1 0B1",
                                  "1RECV_F0 1F0 1RECV_F1 1F1 1B0 1SEND_B0 1B1 1SEND_B1"});
  const auto found = verify_lowered(schedule);
  expect_found(found, 0, "0B0 waits for ever for 1SEND_B0 of rank 1, which stands at 1F1");
  expect_found(found, 1, "1F1 waits for ever for 0SEND_F1 of rank 0, which stands at 0B0");
}

// Rank 1 asks for micro-batch 1 first, but the channel carries micro-batch 0 first.
TEST(Verify, FindsWhatIsStuckBehindAnotherMessage) {
  Schedule schedule = lower(plan("gpipe", {2, 2, 0}), {.lookahead = 0});
  EXPECT_EQ(joined(verify_lowered(schedule)), "");
  auto& row = row_of(schedule, 1);
  const std::size_t first = find(schedule, 1, "1RECV_F0");
  const std::size_t second = find(schedule, 1, "1RECV_F1");
  row.insert(row.begin() + static_cast<std::ptrdiff_t>(first), row[second]);
  row.erase(row.begin() + static_cast<std::ptrdiff_t>(second) + 1);
  expect_found(verify_lowered(schedule), 1, "1RECV_F1 is number 0");
}

TEST(Verify, FindsWeightsAfterTheReduction) {
  Schedule schedule = lower(plan("dualpipe", {2, 4, 0}), {.reduce_gradients = true});
  auto& row = row_of(schedule, 0);
  std::swap(row[row.size() - 1], row[row.size() - 2]);
  expect_found(verify_lowered(schedule), 0, "adds to weight gradients after 0REDUCE_GRAD");
  row_of(schedule, 0).push_back(parse_action("0REDUCE_GRAD"));
  expect_found(verify_lowered(schedule), 0, "0REDUCE_GRAD is there twice");
}

TEST(Verify, AcceptsInferenceAlone) {
  EXPECT_EQ(joined(verify_compute(make(kLoop, 2, {"0F0 0F1", "1F0 1F1"}))), "");
  expect_found(verify_compute(make(kLoop, 2, {"0F0 0F1 0B0", "1F0 1F1 1B0"})), 1, "1I1 is missing");
}

TEST(Verify, TakesNoGradientsInInference) {
  Schedule schedule = lower(plan("1f1b", {2, 2, 0}), {.with_backward = false});
  row_of(schedule, 0).push_back(parse_action("0RECV_B0"));
  expect_found(verify_lowered(schedule), 1, "1SEND_B0 is missing");
}

// Two neighbours in a row of a lowered schedule are swapped: either nothing that matters has
// changed or the verifier reports it; a dropped or doubled action is always found.
TEST(Verify, SurvivesRandomMutations) {
  std::mt19937 random(7);
  int found_swaps = 0;
  for (const char* name : {"dualpipe", "dualpipev", "1f1b", "zb1p", "zbv", "interleaved_1f1b"}) {
    const Schedule good = lower(plan(name, {4, 8, 0}), {});
    for (int i = 0; i < 200; ++i) {
      Schedule schedule = good;
      auto& row = schedule.rows[random() % 4];
      const std::size_t at = random() % (row.size() - 1);
      const auto position = row.begin() + static_cast<std::ptrdiff_t>(at);
      switch (i % 3) {
        case 0:
          row.erase(position);
          EXPECT_FALSE(verify_lowered(schedule).empty());
          break;
        case 1:
          row.insert(position, Action(row[at]));
          EXPECT_FALSE(verify_lowered(schedule).empty());
          break;
        default:
          std::swap(row[at], row[at + 1]);
          found_swaps += verify_lowered(schedule).empty() ? 0 : 1;
      }
    }
  }
  EXPECT_GT(found_swaps, 50);
}

TEST(Verify, ReportsNoMoreThanItsLimit) {
  Schedule schedule = plan("1f1b", {16, 64, 0});
  for (auto& row : schedule.rows) std::reverse(row.begin(), row.end());
  EXPECT_EQ(verify_compute(schedule).size(), kMaxDiagnostics);
}

TEST(ThrowIfAny, ShowsTheFirstFindingsAndTheirNeighbourhood) {
  Schedule schedule = plan("1f1b", {16, 64, 0});
  auto& row = row_of(schedule, 8);
  std::swap(row[40], row[80]);
  const auto found = verify_compute(schedule);
  test::expect_error<ScheduleError>(
      [&] { throw_if_any(schedule, found); },
      {"schedule \"1f1b\" (16 ranks, 64 micro-batches) does not hold:", "rank 8, step 40",
       "rank 5 ", "rank 11"});
  try {
    throw_if_any(schedule, found);
  } catch (const ScheduleError& error) {
    EXPECT_EQ(std::string(error.what()).find("rank 12"), std::string::npos) << error.what();
    EXPECT_LT(std::string(error.what()).size(), 2000U);
  }
  EXPECT_NO_THROW(throw_if_any(schedule, {}));
}

}  // namespace
}  // namespace dualpipe
