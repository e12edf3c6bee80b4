#include "schedule/schedule.h"

namespace dualpipe {
namespace {

// Words are mixed by the finalizer of SplitMix64 (Steele, Lea, Flood 2014): plain arithmetic on
// values, independent of byte order, padding and the standard library's hash.
class Digest {
 public:
  void add(std::uint64_t word) {
    state_ = (state_ ^ word) + 0x9e3779b97f4a7c15ULL;
    state_ = (state_ ^ (state_ >> 30)) * 0xbf58476d1ce4e5b9ULL;
    state_ = (state_ ^ (state_ >> 27)) * 0x94d049bb133111ebULL;
    state_ ^= state_ >> 31;
  }
  void add(std::string_view text) {
    add(text.size());
    for (char character : text) add(static_cast<unsigned char>(character));
  }
  void add(const Action& action) {
    const auto microbatch = static_cast<std::uint32_t>(action.microbatch().value());
    const auto stage = static_cast<std::uint32_t>(action.stage().value());
    add((std::uint64_t{static_cast<std::uint8_t>(action.op())} << 48) |
        (std::uint64_t{stage} << 32) | microbatch);
  }
  [[nodiscard]] std::uint64_t value() const { return state_; }

 private:
  std::uint64_t state_ = 0;
};

}  // namespace

std::uint64_t digest(const Schedule& schedule) {
  Digest digest;
  digest.add(to_string(schedule.placement.kind()));
  for (int size : {schedule.num_ranks(), schedule.num_stages(), schedule.num_microbatches()}) {
    digest.add(static_cast<std::uint64_t>(size));
  }
  for (const auto& row : schedule.rows) {
    digest.add(row.size());
    for (const Action& action : row) {
      digest.add(std::uint64_t{static_cast<std::uint8_t>(action.op())});
      for_each_part(action, [&](const Action& part) { digest.add(part); });
    }
  }
  return digest.value();
}

std::uint64_t text_digest(std::string_view text) {
  Digest digest;
  digest.add(text);
  return digest.value();
}

}  // namespace dualpipe
