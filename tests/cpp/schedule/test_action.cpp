#include "helpers.h"
#include "schedule/action.h"

namespace dualpipe {
namespace {

using test::expect_error;

TEST(Action, TextRoundTrips) {
  for (const char* text :
       {"3F12", "3I12", "3W12", "3B12", "0F0", "(3F12;4B3)OVERLAP_F_B", "(0F7;7I13)OVERLAP_F_B",
        "3SEND_F12", "3RECV_F12", "3SEND_B12", "3RECV_B12", "3REDUCE_GRAD", "65534F2147483646"}) {
    EXPECT_EQ(to_string(parse_action(text)), text);
  }
}

TEST(Action, PartsOfAPair) {
  const Action pair = parse_action("(3F12;4B3)OVERLAP_F_B");
  EXPECT_EQ(pair,
            Action::overlap(Stage(3), Microbatch(12), Op::kBackward, Stage(4), Microbatch(3)));
  EXPECT_EQ(pair.forward_half(), parse_action("3F12"));
  EXPECT_EQ(pair.backward_half(), parse_action("4B3"));
}

TEST(Action, OperationsHaveTheNamesOfTheTexts) {
  EXPECT_EQ(op_name(Op::kBackwardInput), "I");
  EXPECT_EQ(op_name(Op::kReduceGrad), "REDUCE_GRAD");
  EXPECT_THROW((void)op_name(Op::kOverlap), InternalError);
}

TEST(Action, EveryBitOfItIsCompared) {
  EXPECT_NE(parse_action("(3F12;4B3)OVERLAP_F_B"), parse_action("(3F12;4I3)OVERLAP_F_B"));
  EXPECT_NE(parse_action("(3F12;4B3)OVERLAP_F_B"), parse_action("(3F12;4B4)OVERLAP_F_B"));
  EXPECT_NE(parse_action("3F12"), parse_action("3B12"));
}

struct BadText {
  const char* text;
  std::size_t column;
  const char* part;
};

std::ostream& operator<<(std::ostream& out, const BadText& bad) {
  return out << '"' << bad.text << '"';
}

class BadAction : public ::testing::TestWithParam<BadText> {};

TEST_P(BadAction, NamesTheColumn) {
  const BadText& bad = GetParam();
  try {
    (void)parse_action(bad.text);
    FAIL() << bad.text << " was accepted";
  } catch (const ActionSyntaxError& error) {
    EXPECT_EQ(error.column(), bad.column) << error.what();
    EXPECT_NE(std::string(error.what()).find(bad.part), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find(cat("column ", bad.column)), std::string::npos);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Texts, BadAction,
    ::testing::Values(
        BadText{"", 1, "a stage number"}, BadText{"F1", 1, "a stage number"},
        BadText{"3", 2, "one of F, B"}, BadText{"3Q1", 2, "one of F, B"},
        BadText{"3F", 3, "a micro-batch number"}, BadText{"3F1x", 4, "the end of the action"},
        BadText{" 3F1", 1, "a stage number"}, BadText{"3F1 ", 4, "the end of the action"},
        BadText{"03F1", 1, "without leading zeros"}, BadText{"3F01", 3, "without leading zeros"},
        BadText{"3f1", 2, "one of F, B"}, BadText{"-1F0", 1, "a stage number"},
        BadText{"65535F0", 5, "at most 65534"}, BadText{"3F99999999999", 12, "at most"},
        BadText{"3UNSHARD", 2, "one of F, B"}, BadText{"3REDUCE_GRAD1", 13, "the end"},
        BadText{"3SEND_F", 8, "a micro-batch number"}, BadText{"(3F1;4B2)", 9, "OVERLAP_F_B"},
        BadText{"(3F1;4B2)OVERLAP_F_B0", 21, "the end"}, BadText{"(3F1)OVERLAP_F_B", 5, "';'"},
        BadText{"(3B1;4B2)OVERLAP_F_B", 2, "a forward"},
        BadText{"(3F1;4W2)OVERLAP_F_B", 6, "a backward"},
        BadText{"(3F1;(4B2;5F3)OVERLAP_F_B)OVERLAP_F_B", 6, "a stage number"}));

TEST(Action, LiveActivationsCountAPairsForwardBeforeItsBackward) {
  LiveActivations live;
  live.add(parse_action("0F0"));
  live.add(parse_action("(0F1;0B0)OVERLAP_F_B"));
  live.add(parse_action("0I1"));
  live.add(parse_action("0W1"));
  EXPECT_EQ(live.peak(), 2);
}

}  // namespace
}  // namespace dualpipe
