#pragma once

#include <memory>

namespace dualpipe {

// The connections of a destroyed pipeline are released only when no step of this process is being
// issued. Releasing them frees memory, which may wait for the whole device, and the device may wait
// for messages that the waiting thread has yet to issue: Python's garbage collector destroys
// pipelines wherever it runs, even in the middle of another pipeline's step.

// A step whose messages are being issued. Its constructor waits for a release that has begun, but
// only some seconds, as that may hang with its device.
class StepUnderWay {
 public:
  StepUnderWay();
  ~StepUnderWay();
  StepUnderWay(const StepUnderWay&) = delete;
  StepUnderWay& operator=(const StepUnderWay&) = delete;
};

// Releases `connection` now, or else on the thread that ends the last step under way.
void let_go_between_steps(std::shared_ptr<void> connection);

}  // namespace dualpipe
