#include "schedule/local_cells.h"
#include "schedule/passes/passes.h"

namespace dualpipe {
namespace {

constexpr int kNone = -1;

class Pool {
 public:
  int take() {
    if (free_.empty()) return num_buffers_++;
    const int buffer = free_.back();
    free_.pop_back();
    return buffer;
  }
  void give_back(int& buffer) {
    if (buffer != kNone) free_.push_back(buffer);
    buffer = kNone;
  }
  [[nodiscard]] int num_buffers() const { return num_buffers_; }

 private:
  std::vector<int> free_;
  int num_buffers_ = 0;
};

}  // namespace

BufferAssignment assign_receive_buffers(const Schedule& lowered, Rank rank) {
  const LocalCells cells(lowered.placement, rank);
  const std::vector<Action>& row = lowered.row(rank);
  const std::vector<int> last = last_compute_steps(row, cells);
  std::vector<int> activation(cells.size(), kNone);
  std::vector<int> gradient(cells.size(), kNone);
  BufferAssignment result;
  Pool pool;
  for (std::size_t step = 0; step < row.size(); ++step) {
    const Action& action = row[step];
    if (is_recv(action.op())) {
      auto& buffers = action.op() == Op::kRecvForward ? activation : gradient;
      result.buffer_of_recv.push_back(buffers[cells(action)] = pool.take());
    } else if (is_compute(action.op())) {
      for_each_part(action, [&](const Action& part) {
        if (last[cells(part)] != static_cast<int>(step)) return;
        pool.give_back(activation[cells(part)]);
        pool.give_back(gradient[cells(part)]);
      });
    }
  }
  result.num_buffers = pool.num_buffers();
  return result;
}

}  // namespace dualpipe
