#include <cstdlib>
#include <fstream>
#include <sstream>

#include "helpers.h"

namespace dualpipe {
namespace {

// Any change of an order shows up in review as a change of a text file. To regenerate the files:
// DUALPIPE_UPDATE_GOLDEN=1 build/tests/cpp/test_schedule --gtest_filter='Golden*'
struct Golden {
  const char* name;
  int num_ranks;
  int num_microbatches;
};

std::ostream& operator<<(std::ostream& out, const Golden& golden) { return out << golden.name; }

std::string path_of(const Golden& golden) {
  return cat(DUALPIPE_TESTS_DIR, "/golden/", golden.name, "_p", golden.num_ranks, "_n",
             golden.num_microbatches, ".csv");
}

std::string read(const std::string& path) {
  std::ifstream in(path);
  EXPECT_TRUE(in) << path << " cannot be read";
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

class GoldenSchedule : public ::testing::TestWithParam<Golden> {};

TEST_P(GoldenSchedule, IsUnchanged) {
  const Golden& golden = GetParam();
  const Schedule schedule = plan(golden.name, {golden.num_ranks, golden.num_microbatches, 0});
  if (std::getenv("DUALPIPE_UPDATE_GOLDEN") != nullptr) {
    std::ofstream(path_of(golden)) << to_csv(schedule);
  }
  EXPECT_EQ(read(path_of(golden)), to_csv(schedule));
}

INSTANTIATE_TEST_SUITE_P(Files, GoldenSchedule,
                         ::testing::Values(Golden{"dualpipe", 2, 4}, Golden{"dualpipe", 4, 8},
                                           Golden{"dualpipe", 8, 20}, Golden{"dualpipev", 2, 4},
                                           Golden{"dualpipev", 4, 8}, Golden{"dualpipev", 4, 10},
                                           Golden{"1f1b", 4, 8}, Golden{"zb1p", 4, 8},
                                           Golden{"zbv", 4, 8}, Golden{"zbv", 4, 4},
                                           Golden{"gpipe", 4, 8}, Golden{"interleaved_1f1b", 4, 8},
                                           Golden{"interleaved_1f1b", 4, 10}),
                         [](const auto& info) {
                           const std::string name = info.param.name;
                           return cat(name == "1f1b" ? "one_f_one_b" : name, "_p",
                                      info.param.num_ranks, "_n", info.param.num_microbatches);
                         });

}  // namespace
}  // namespace dualpipe
