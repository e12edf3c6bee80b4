#include "comm/copy_mailbox.h"

#include <array>
#include <atomic>
#include <chrono>
#include <new>
#include <thread>
#include <utility>

#include "common/error.h"

namespace dualpipe {

namespace {

constexpr std::chrono::microseconds kPoll{50};
constexpr std::size_t kPage = 4096;
constexpr std::size_t kLine = 128;  // bytes that processors and devices fetch together
constexpr std::uint32_t kFarAhead = std::uint32_t{1} << 30;

using Shareable = std::atomic<std::uint32_t>;
static_assert(Shareable::is_always_lock_free && sizeof(Shareable) == sizeof(std::uint32_t));

// A page of host memory that the devices of this process may use.
struct Registered {
  Registered(std::shared_ptr<CopyCalls> by, std::byte* data)
      : calls(std::move(by)), memory(data), device_view(calls->register_memory(data, kPage)) {}
  ~Registered() { calls->unregister_memory(memory); }
  Registered(const Registered&) = delete;
  Registered& operator=(const Registered&) = delete;

  const std::shared_ptr<CopyCalls> calls;
  std::byte* const memory;
  std::byte* const device_view;
};

}  // namespace

struct CopyMailbox::Shared {
  struct alignas(kLine) Line {
    Shareable value;
  };
  std::array<Line, 2> flags;  // by Flag; in the page that is registered

  struct alignas(kPage) Marks {
    Shareable came;
    Shareable arrived;  // value of kArrived when this side gave up
    Shareable aborted;
    Shareable quiet;
  };
  std::array<Marks, 2> marks;  // by side

  Line num_posted;
  Line num_taken;
  std::array<Posting, kCapacity> ring;
};

std::shared_ptr<CopyMailbox> CopyMailbox::create(std::shared_ptr<CopyCalls> calls) {
  auto segment = SharedSegment::create(sizeof(Shared));
  auto* const shared = new (segment->data()) Shared;  // the rest is zero already
  for (auto& flag : shared->flags) flag.value = kFirstMessage;
  return std::make_shared<CopyMailbox>(std::move(calls), std::move(segment), 0);
}

std::shared_ptr<CopyMailbox> CopyMailbox::open(std::shared_ptr<CopyCalls> calls,
                                               const std::string& name) {
  return std::make_shared<CopyMailbox>(std::move(calls), SharedSegment::open(name, sizeof(Shared)),
                                       1);
}

CopyMailbox::CopyMailbox(std::shared_ptr<CopyCalls> calls, std::shared_ptr<SharedSegment> segment,
                         int side)
    : calls_(std::move(calls)),
      segment_(std::move(segment)),
      side_(side),
      shared_(std::launder(reinterpret_cast<Shared*>(segment_->data()))) {
  const auto registered = std::static_pointer_cast<Registered>(
      segment_->once([this] { return std::make_shared<Registered>(calls_, segment_->data()); }));
  device_view_ = registered->device_view;
  segment_->join(side_);
  shared_->marks[static_cast<std::size_t>(side_)].came = 1;
}

CopyMailbox::~CopyMailbox() {
  for (const EventPtr& event : held_back_) {
    try {
      while (!event->done()) std::this_thread::sleep_for(kPoll);  // synchronize() may be refused
    } catch (const std::exception&) {
      // The device is broken: none of its streams waits here any more.
    }
  }
}

bool CopyMailbox::post(const Posting& posting) {
  const std::uint32_t posted = shared_->num_posted.value;
  if (posted - shared_->num_taken.value == kCapacity) return false;
  shared_->ring[posted % kCapacity] = posting;
  shared_->num_posted.value = posted + 1;
  return true;
}

std::optional<Posting> CopyMailbox::take() {
  const std::uint32_t taken = shared_->num_taken.value;
  if (taken == shared_->num_posted.value) return std::nullopt;
  const Posting posting = shared_->ring[taken % kCapacity];
  shared_->num_taken.value = taken + 1;
  return posting;
}

std::uint32_t* CopyMailbox::address(Flag flag) const {
  return reinterpret_cast<std::uint32_t*>(device_view_ + flag * sizeof(Shared::Line));
}

void CopyMailbox::write(Flag flag, std::uint32_t value, Stream& stream) {
  calls_->write_value(address(flag), value, stream);
}

void CopyMailbox::wait(Flag flag, std::uint32_t value, Stream& stream) {
  calls_->wait_value(address(flag), value, stream);
}

void CopyMailbox::hold_back(Stream& stream, Flag flag, std::uint32_t value) {
  wait(flag, value, stream);
  EventPtr passed = stream.record();
  const std::lock_guard lock(mutex_);
  std::erase_if(held_back_, [](const EventPtr& event) { return event->done(); });
  held_back_.push_back(std::move(passed));
}

bool CopyMailbox::has_reached(Flag flag, std::uint32_t value) const {
  return static_cast<std::int32_t>(shared_->flags[flag].value - value) >= 0;
}

bool CopyMailbox::has_arrived(std::uint32_t value) const {
  for (const auto& marks : shared_->marks) {
    if (marks.aborted != 0) return static_cast<std::int32_t>(marks.arrived - value) >= 0;
  }
  return has_reached(kArrived, value);
}

void CopyMailbox::release_all(std::uint32_t message) noexcept {
  for (auto& flag : shared_->flags) flag.value = message + kFarAhead;
}

void CopyMailbox::mark_aborted() noexcept {
  const std::lock_guard lock(mark_mutex_);  // a caller that finds the mark may then change flags
  auto& own = shared_->marks[static_cast<std::size_t>(side_)];
  const auto& peer = shared_->marks[static_cast<std::size_t>(1 - side_)];
  if (own.aborted != 0) return;
  const std::uint32_t arrived = shared_->flags[kArrived].value;
  // A peer that has given up may have changed the flag since, but not before it set its mark.
  own.arrived = peer.aborted != 0 ? peer.arrived.load() : arrived;
  own.aborted = 1;
}
void CopyMailbox::mark_quiet() noexcept {
  shared_->marks[static_cast<std::size_t>(side_)].quiet = 1;
}
bool CopyMailbox::is_over() const {
  return shared_->marks[0].aborted != 0 || shared_->marks[1].aborted != 0;
}
bool CopyMailbox::peer_aborted() const {
  return shared_->marks[static_cast<std::size_t>(1 - side_)].aborted != 0;
}
bool CopyMailbox::peer_quiet() const {
  return shared_->marks[static_cast<std::size_t>(1 - side_)].quiet != 0;
}
bool CopyMailbox::peer_came() const {
  return shared_->marks[static_cast<std::size_t>(1 - side_)].came != 0;
}
bool CopyMailbox::peer_lives() const { return segment_->is_joined(1 - side_); }

}  // namespace dualpipe
