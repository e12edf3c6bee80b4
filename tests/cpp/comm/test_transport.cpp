#include <gtest/gtest.h>

#include "comm/transport.h"

namespace dualpipe {
namespace {

TEST(MessageId, IsNamedAsTheScheduleSeesIt) {
  const auto text = [](MessageKind kind) {
    return to_string(MessageId{kind, Stage(3), Microbatch(12)});
  };
  EXPECT_EQ(text(MessageKind::kActivation), "activation of micro-batch 12 for stage 3");
  EXPECT_EQ(text(MessageKind::kGradient), "gradient of micro-batch 12 for stage 3");
  EXPECT_EQ(text(MessageKind::kMirrorLow), "mirrored gradients of stage 3, bucket 12");
}

TEST(StepInfo, MismatchReadsTheSameOnBothRanks) {
  const StepInfo one{4, 0xa, "training"};
  const StepInfo other{4, 0xb, "inference"};
  EXPECT_FALSE(same_step(one, other));
  const std::string text = describe_mismatch(Rank(0), one, Rank(1), other);
  EXPECT_EQ(text, describe_mismatch(Rank(1), other, Rank(0), one));
  EXPECT_NE(text.find("rank 0 runs \"training\" (run 4, program a), rank 1 runs "
                      "\"inference\" (run 4, program b)"),
            std::string::npos)
      << text;
}

}  // namespace
}  // namespace dualpipe
