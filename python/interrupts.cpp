#include "interrupts.h"

#include <pybind11/pybind11.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>

namespace dualpipe {
namespace {

namespace py = pybind11;

std::atomic<bool> came{false};
int depth = 0;            // of scopes on the main thread
bool installed = false;   // by the outermost one
struct sigaction before;  // the interpreter's own handler

void note(int signal, siginfo_t* info, void* context) {
  came.store(true, std::memory_order_relaxed);
  if ((before.sa_flags & SA_SIGINFO) != 0) {
    before.sa_sigaction(signal, info, context);
  } else {
    before.sa_handler(signal);
  }
}

bool raises_keyboard_interrupt() {
  const py::module_ signals = py::module_::import("signal");
  return signals.attr("getsignal")(SIGINT).is(signals.attr("default_int_handler"));
}

void install() {
  sigaction(SIGINT, nullptr, &before);
  struct sigaction noting = before;
  noting.sa_flags |= SA_SIGINFO;
  noting.sa_sigaction = &note;
  installed = sigaction(SIGINT, &noting, nullptr) == 0;
}

}  // namespace

InterruptScope::InterruptScope() : is_main_thread_(gettid() == getpid()) {
  if (!is_main_thread_) return;
  const bool wanted = depth == 0 && raises_keyboard_interrupt();  // may raise: it runs Python
  ++depth;
  if (wanted) install();
}

InterruptScope::~InterruptScope() {
  if (!is_main_thread_ || --depth > 0) return;
  if (installed) sigaction(SIGINT, &before, nullptr);
  installed = false;
  came.store(false, std::memory_order_relaxed);
}

bool InterruptScope::interrupted() { return came.load(std::memory_order_relaxed); }

void raise_interrupt() {
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

}  // namespace dualpipe
