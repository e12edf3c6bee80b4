#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>

namespace simulated {

constexpr int kHighestPriority = -5;  // the lowest is 0

// A point that a stream gets to. Any thread.
class Point {
 public:
  void reach();
  [[nodiscard]] bool is_reached() const { return reached_.load(); }
  void wait() const;  // blocks the thread
  [[nodiscard]] std::int64_t nanoseconds() const { return nanoseconds_; }

 private:
  std::atomic<bool> reached_ = false;
  std::int64_t nanoseconds_ = 0;  // when it was reached
};
using PointPtr = std::shared_ptr<Point>;

using Work = std::function<void()>;

// A thread that does what it is given, in order. On the heap, and nobody's to delete: what it does
// may wait for something that never comes.
class Worker {
 public:
  void put(Work work);
  void end();  // after all that was put; nothing may be put any more

 private:
  void run();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Work> works_;
  bool has_thread_ = false;
};

// A queue between host and device, which streams of one priority may share. It starts entries in
// order, each as soon as the one before it of the same stream is done; what has to wait keeps back
// all behind it, of other streams, too. That is how the streams of a GPU share a hardware queue:
// NVIDIA, CUDA C/C++ Streams and Concurrency (2011). There are CUDA_DEVICE_MAX_CONNECTIONS for
// a priority, 8 by default, given out in turn.
using Queue = Worker;

// Any thread.
class Stream {
 public:
  explicit Stream(int priority);
  ~Stream();  // what was put goes on
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  void put(Work work);
  void wait(const PointPtr& point);
  [[nodiscard]] PointPtr record();  // when what was put so far is done
  [[nodiscard]] bool is_idle();

 private:
  PointPtr put_after(const PointPtr& point, Work work);

  Queue& queue_;
  Worker* const kernels_ = new Worker;
  std::mutex mutex_;
  PointPtr last_;  // the end of what was put last
};

// The stream that is meant by a handle; null is the default stream.
[[nodiscard]] Stream& stream_of(void* handle);

// Until all that was issued, on any stream, is done.
void finish_all();

// Does it then. Where a kernel asks, for Python's garbage collector runs in kernels here, behind
// its back: what it waits for may be itself.
void after_all(Work work);

// Waits of the host let go of Python's lock: the work that they wait for may be Python's here,
// where on a GPU it is not.
void wait_on_host(const Point& point);

}  // namespace simulated
