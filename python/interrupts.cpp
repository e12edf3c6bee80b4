#include "interrupts.h"

#include <pybind11/pybind11.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>

namespace dualpipe {
namespace {

std::atomic<bool> came{false};
struct sigaction before;  // the interpreter's handler

void note(int signal, siginfo_t* info, void* context) {
  came.store(true, std::memory_order_relaxed);
  if ((before.sa_flags & SA_SIGINFO) != 0) {
    before.sa_sigaction(signal, info, context);
  } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
    before.sa_handler(signal);
  }
}

bool takes_signals() {
  if (gettid() != getpid()) return false;
  sigaction(SIGINT, nullptr, &before);
  // Without a handler of the interpreter's there is nobody to raise anything.
  return (before.sa_flags & SA_SIGINFO) != 0 ||
         (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN);
}

}  // namespace

InterruptScope::InterruptScope() : is_main_thread_(takes_signals()) {
  if (!is_main_thread_) return;
  struct sigaction noting = before;
  noting.sa_flags |= SA_SIGINFO;
  noting.sa_sigaction = &note;
  sigaction(SIGINT, &noting, nullptr);
}

InterruptScope::~InterruptScope() {
  if (!is_main_thread_) return;
  sigaction(SIGINT, &before, nullptr);
  came.store(false, std::memory_order_relaxed);
}

bool InterruptScope::interrupted() { return came.load(std::memory_order_relaxed); }

void raise_interrupt() {
  if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

}  // namespace dualpipe
