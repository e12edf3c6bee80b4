#include "common/error.h"
#include "schedule/local_cells.h"
#include "schedule/verify/findings.h"

namespace dualpipe {

std::vector<Diagnostic> verify_buffers(const Schedule& lowered, Rank rank,
                                       const BufferAssignment& assignment) {
  const std::vector<Action>& row = lowered.row(rank);
  const LocalCells cells(lowered.placement, rank);
  const std::vector<int> last = last_compute_steps(row, cells);
  std::vector<int> needed_until(static_cast<std::size_t>(assignment.num_buffers), -1);
  Findings findings;
  std::size_t receive = 0;
  for (std::size_t step = 0; step < row.size(); ++step) {
    if (!is_recv(row[step].op())) continue;
    if (receive == assignment.buffer_of_recv.size()) {
      findings.add(rank, step, cat(to_string(row[step]), " has no receive buffer"));
      break;
    }
    const int buffer = assignment.buffer_of_recv[receive++];
    if (buffer < 0 || buffer >= assignment.num_buffers) {
      findings.add(
          rank, step,
          cat(to_string(row[step]), " fills buffer ", buffer, " of ", assignment.num_buffers));
      continue;
    }
    int& until = needed_until[static_cast<std::size_t>(buffer)];
    if (until > static_cast<int>(step)) {
      findings.add(rank, step,
                   cat(to_string(row[step]), " refills buffer ", buffer, ", which ",
                       to_string(row[static_cast<std::size_t>(until)]), " still reads"));
    }
    until = last[cells(row[step])];
  }
  return findings.take();
}

}  // namespace dualpipe
