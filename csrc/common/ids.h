#pragma once

#include <compare>
#include <cstdint>
#include <functional>
#include <ostream>

namespace dualpipe {

// An integer id that does not convert to another kind of id: a rank is never a stage.
template <typename Tag>
class StrongId {
 public:
  constexpr StrongId() = default;
  constexpr explicit StrongId(std::int32_t value) : value_(value) {}

  [[nodiscard]] constexpr std::int32_t value() const { return value_; }
  // For indexing containers; the id must be valid.
  [[nodiscard]] constexpr std::size_t index() const { return static_cast<std::size_t>(value_); }
  [[nodiscard]] constexpr bool valid() const { return value_ >= 0; }

  constexpr auto operator<=>(const StrongId&) const = default;

 private:
  std::int32_t value_ = -1;
};

using Rank = StrongId<struct RankTag>;
using Stage = StrongId<struct StageTag>;
using Microbatch = StrongId<struct MicrobatchTag>;

template <typename Tag>
std::ostream& operator<<(std::ostream& out, StrongId<Tag> id) {
  return out << id.value();
}

// kDown: micro-batches that enter at rank 0. kUp: those that enter at rank P-1.
enum class Direction : std::uint8_t { kDown, kUp };

}  // namespace dualpipe

template <typename Tag>
struct std::hash<dualpipe::StrongId<Tag>> {
  std::size_t operator()(dualpipe::StrongId<Tag> id) const noexcept {
    return std::hash<std::int32_t>{}(id.value());
  }
};
