#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace dualpipe {

// The type says who is at fault, and determines the Python exception (python/bind_errors.cpp):
//
//   UserError      the caller made a mistake                  ValueError
//   TypeMismatch   the caller passed a wrong type             TypeError
//   ScheduleError  a schedule that cannot be built or proved  ScheduleError, a ValueError
//   PipelineError  a rank or a link failed                    PipelineError
//   InternalError  a bug in this library                      InternalError
class UserError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

class TypeMismatch : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

class ScheduleError : public UserError {
 public:
  using UserError::UserError;
};

class PipelineError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class InternalError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

// Concatenates anything that can be streamed: cat("rank ", rank, " of ", num_ranks).
template <typename... Parts>
std::string cat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace dualpipe

// Throws InternalError with file and line. For conditions that only a bug in this library can
// violate.
#define DUALPIPE_CHECK(condition, ...)                                                            \
  do {                                                                                            \
    if (!(condition)) [[unlikely]] {                                                              \
      throw ::dualpipe::InternalError(::dualpipe::cat(__FILE__, ":", __LINE__, ": ",              \
                                                      "expected " #condition ": ", __VA_ARGS__)); \
    }                                                                                             \
  } while (false)

// Throws UserError. The text says what was found, what is allowed and what to do.
#define DUALPIPE_USER_CHECK(condition, ...)                      \
  do {                                                           \
    if (!(condition)) [[unlikely]] {                             \
      throw ::dualpipe::UserError(::dualpipe::cat(__VA_ARGS__)); \
    }                                                            \
  } while (false)
