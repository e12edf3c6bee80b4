#include <cuda_runtime_api.h>

#include <algorithm>
#include <mutex>
#include <utility>

#include "errors.h"
#include "streams.h"

using simulated::fail;
using simulated::PointPtr;
using simulated::stream_of;

namespace {

// What it was recorded as last; null, before that. As CUDA has it, then it is done.
class Event {
 public:
  void set(PointPtr point) {
    const std::lock_guard lock(mutex_);
    point_ = std::move(point);
  }
  PointPtr get() {
    const std::lock_guard lock(mutex_);
    return point_;
  }

 private:
  std::mutex mutex_;
  PointPtr point_;
};

PointPtr point_of(cudaEvent_t event) { return reinterpret_cast<Event*>(event)->get(); }

}  // namespace

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int priority) {
  const int possible = std::clamp(priority, simulated::kHighestPriority, 0);
  *stream = reinterpret_cast<cudaStream_t>(new simulated::Stream(possible));
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}
// Its work goes on, as on a GPU.
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete reinterpret_cast<simulated::Stream*>(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  wait_on_host(*stream_of(stream).record());
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return stream_of(stream).is_idle() ? cudaSuccess : fail(cudaErrorNotReady);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  stream_of(stream).put([function, data] { function(data); });
  return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data,
                                  unsigned) {
  stream_of(stream).put([stream, function, data] { function(stream, cudaSuccess, data); });
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  reinterpret_cast<Event*>(event)->set(stream_of(stream).record());
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  const PointPtr point = point_of(event);
  return point == nullptr || point->is_reached() ? cudaSuccess : fail(cudaErrorNotReady);
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (const PointPtr point = point_of(event)) wait_on_host(*point);
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (const PointPtr point = point_of(event)) stream_of(stream).wait(point);
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  const PointPtr from = point_of(start);
  const PointPtr to = point_of(end);
  if (from == nullptr || to == nullptr) return fail(cudaErrorInvalidResourceHandle);
  if (!from->is_reached() || !to->is_reached()) return fail(cudaErrorNotReady);
  *milliseconds = static_cast<float>(to->nanoseconds() - from->nanoseconds()) * 1e-6F;
  return cudaSuccess;
}
