#include <gtest/gtest.h>

#include <atomic>
#include <latch>

#include "device/device_pool.h"
#include "device/fake_device.h"

namespace dualpipe {
namespace {

using testing::FakeDevice;

DevicePool pool_of(const std::shared_ptr<FakeDevice>& device) {
  return DevicePool(device, device->compute(), device->allocator());
}

TEST(DevicePool, ABufferIsFreeWhenWhoeverHadItHasReadIt) {
  const auto device = std::make_shared<FakeDevice>();
  DevicePool pool = pool_of(device);
  auto first = pool.acquire(1000);
  std::latch may_read(1);
  std::atomic<bool> has_read{false};
  device->compute().launch([&] {
    may_read.wait();
    has_read = true;
  });
  first.owner.reset();  // the read is still in the queue
  const auto second = pool.acquire(1000);
  EXPECT_EQ(second.data, first.data);
  ASSERT_NE(second.free, nullptr);
  EXPECT_FALSE(second.free->done());
  may_read.count_down();
  second.free->synchronize();
  EXPECT_TRUE(has_read);
}

TEST(DevicePool, OnlyItsReaderIsWaitedFor) {
  const auto device = std::make_shared<FakeDevice>();
  DevicePool pool(device, device->reduction(0), device->allocator());
  std::latch may_compute(1);
  device->compute().launch([&] { may_compute.wait(); });
  pool.acquire(1000).owner.reset();
  pool.acquire(1000).free->synchronize();
  may_compute.count_down();
}

TEST(DevicePool, AllocatesNothingInTheSteadyState) {
  DevicePool pool = pool_of(std::make_shared<FakeDevice>());
  for (int step = 0; step < 10; ++step) {
    const auto one = pool.acquire(1000);
    const auto other = pool.acquire(1000);
    const auto large = pool.acquire(1 << 20);
    EXPECT_NE(one.data, other.data);
  }
  EXPECT_EQ(pool.statistics().num_allocations, 3);
}

TEST(DevicePool, BuffersMayOutliveIt) {
  std::shared_ptr<void> owner;
  {
    DevicePool pool = pool_of(std::make_shared<FakeDevice>());
    auto lease = pool.acquire(64);
    owner = lease.owner;
    *lease.data = std::byte{1};
  }
  EXPECT_EQ(*static_cast<std::byte*>(owner.get()), std::byte{1});
}

}  // namespace
}  // namespace dualpipe
