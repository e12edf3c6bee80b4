#include "errors.h"

#include <cstdio>
#include <mutex>
#include <set>
#include <string>

namespace {

thread_local cudaError_t last = cudaSuccess;

}  // namespace

namespace simulated {

cudaError_t fail(cudaError_t error) { return last = error; }

void lacks(const char* what, const char* name) {
  static std::mutex mutex;
  static auto* const said = new std::set<std::string>;
  const std::lock_guard lock(mutex);
  if (!said->insert(name).second) return;
  std::fprintf(stderr, "the simulated GPU has no %s %s\n", what, name);
}

}  // namespace simulated

cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last; }
