#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

namespace dualpipe {

// For what has threads and connections: its end waits for them, and what it frees may be Python's,
// so both want the interpreter lock to be free. In a forked child there are no such threads, and
// the connections are its parent's.
struct DeleteUnlocked {
  pid_t process = getpid();

  template <typename T>
  void operator()(T* object) const {
    if (getpid() != process) return;
    const pybind11::gil_scoped_release unlocked;
    delete object;
  }
};

}  // namespace dualpipe
