#include <gtest/gtest.h>

#include "comm/harness.h"
#include "comm/layouts.h"

namespace dualpipe {
namespace {

using namespace dualpipe::testing;

StepKind kind(std::uint64_t shapes) { return {1, shapes, shapes}; }

bool knows(KnownLayouts& layouts, std::uint64_t shapes) {
  WayLayouts& way = layouts.of(kind(shapes), 2).ways[1];
  way.begin();
  return way.next() != nullptr;
}

void learn(KnownLayouts& layouts, std::uint64_t shapes) {
  WayLayouts& way = layouts.of(kind(shapes), 2).ways[1];
  way.begin();
  way.write_down({bytes_spec(8)});
  way.commit();
}

TEST(KnownLayouts, ForgetTheKindThatWasLongestAgo) {
  KnownLayouts layouts;
  for (std::uint64_t shapes = 0; shapes < KnownLayouts::kMaxKinds; ++shapes) {
    learn(layouts, shapes);
  }
  EXPECT_TRUE(knows(layouts, 0));  // and now it is the most recent one
  learn(layouts, KnownLayouts::kMaxKinds);
  EXPECT_TRUE(knows(layouts, 0));
  EXPECT_FALSE(knows(layouts, 1));
}

}  // namespace
}  // namespace dualpipe
