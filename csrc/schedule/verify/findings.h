#pragma once

#include <utility>
#include <vector>

#include "schedule/verify/verify.h"

namespace dualpipe {

// Collects diagnostics up to a limit: a broken schedule of a thousand ranks breaks everywhere.
class Findings {
 public:
  [[nodiscard]] bool empty() const { return diagnostics_.empty(); }
  [[nodiscard]] bool full() const { return diagnostics_.size() >= kMaxDiagnostics; }
  void add(Rank rank, std::size_t step, std::string text) {
    if (!full()) diagnostics_.push_back({rank, static_cast<int>(step), std::move(text)});
  }
  void add_row(Rank rank, std::string text) {
    if (!full()) diagnostics_.push_back({rank, -1, std::move(text)});
  }
  [[nodiscard]] std::vector<Diagnostic> take() { return std::move(diagnostics_); }

 private:
  std::vector<Diagnostic> diagnostics_;
};

}  // namespace dualpipe
