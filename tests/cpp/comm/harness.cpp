#include "comm/harness.h"

#include <exception>
#include <thread>

namespace dualpipe::testing {
namespace {

std::byte pattern(unsigned seed, std::size_t tensor, std::size_t offset) {
  return static_cast<std::byte>(seed * 31 + tensor * 7 + offset * 13 + offset / 251);
}

}  // namespace

void run_ranks(int num_ranks, const std::function<void(int rank)>& body) {
  std::vector<std::exception_ptr> errors(static_cast<std::size_t>(num_ranks));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < num_ranks; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        body(rank);
      } catch (...) {
        errors[static_cast<std::size_t>(rank)] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

TensorSpec bytes_spec(std::uint64_t num_bytes, std::int8_t dtype) {
  TensorSpec spec;
  spec.dtype = dtype;
  if (spec.absent()) return spec;
  spec.num_dims = 1;
  spec.shape[0] = static_cast<std::int64_t>(num_bytes);
  spec.num_bytes = num_bytes;
  return spec;
}

Message make_message(const Layout& layout, unsigned seed) {
  auto storage = std::make_shared<std::vector<std::vector<std::byte>>>(layout.size());
  Message message{layout, {}, storage};
  for (std::size_t tensor = 0; tensor < layout.size(); ++tensor) {
    std::vector<std::byte>& bytes = (*storage)[tensor];
    bytes.resize(layout[tensor].num_bytes);
    for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = pattern(seed, tensor, i);
    message.data.push_back(layout[tensor].absent() ? nullptr : bytes.data());
  }
  return message;
}

bool has_pattern(const Message& message, const Layout& layout, unsigned seed) {
  if (message.layout != layout || message.data.size() != layout.size()) return false;
  for (std::size_t tensor = 0; tensor < layout.size(); ++tensor) {
    if ((message.data[tensor] == nullptr) != layout[tensor].absent()) return false;
    for (std::size_t i = 0; i < layout[tensor].num_bytes; ++i) {
      if (message.data[tensor][i] != pattern(seed, tensor, i)) return false;
    }
  }
  return true;
}

}  // namespace dualpipe::testing
