#pragma once

#include <memory>

namespace dualpipe {

// The connections of a pipeline that is gone end at the first moment at which no step of this
// process is being issued. Their end frees memory, which may wait for the whole device, and the
// device for messages that the waiting thread has yet to issue: Python's garbage collector ends
// pipelines wherever it runs, in the middle of the step of another pipeline as well.

// A step whose messages are being issued. Its beginning waits for an end that has begun; some
// seconds at most, as that may hang with its device.
class StepUnderWay {
 public:
  StepUnderWay();
  ~StepUnderWay();
  StepUnderWay(const StepUnderWay&) = delete;
  StepUnderWay& operator=(const StepUnderWay&) = delete;
};

// Lets go of it now, or else on the thread that ends the last step under way.
void let_go_between_steps(std::shared_ptr<void> connection);

}  // namespace dualpipe
