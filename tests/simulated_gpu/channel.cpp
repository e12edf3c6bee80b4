#include "channel.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <utility>

namespace simulated {
namespace {

constexpr std::chrono::milliseconds kPause{1};
constexpr std::size_t kMostInPath = sizeof(sockaddr_un::sun_path) - 1;

struct Address {
  sockaddr_un value{};
  socklen_t size = 0;
};

// In the abstract namespace: no file is left behind.
Address address_of(const std::string& name) {
  Address address;
  address.value.sun_family = AF_UNIX;
  const std::size_t length = std::min(name.size(), kMostInPath);
  std::memcpy(address.value.sun_path + 1, name.data(), length);
  address.size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + length);
  return address;
}

Socket make_socket() { return Socket(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)); }

}  // namespace

Socket::Socket(Socket&& other) noexcept : file_(std::exchange(other.file_, -1)) {}
Socket& Socket::operator=(Socket&& other) noexcept {
  std::swap(file_, other.file_);
  return *this;
}
Socket::~Socket() {
  if (file_ >= 0) close(file_);
}

void Socket::end() const {
  if (file_ >= 0) shutdown(file_, SHUT_RDWR);
}

bool Socket::write(const void* data, std::size_t num_bytes) const {
  const auto* next = static_cast<const char*>(data);
  while (num_bytes > 0) {
    const ssize_t count = ::send(file_, next, num_bytes, MSG_NOSIGNAL);
    if (count <= 0) return false;
    next += count;
    num_bytes -= static_cast<std::size_t>(count);
  }
  return true;
}

bool Socket::read(void* data, std::size_t num_bytes) const {
  auto* next = static_cast<char*>(data);
  while (num_bytes > 0) {
    const ssize_t count = recv(file_, next, num_bytes, 0);
    if (count <= 0) return false;
    next += count;
    num_bytes -= static_cast<std::size_t>(count);
  }
  return true;
}

void Channel::listen() {
  if (end_ != 0) return;
  const Address address = address_of(name_);
  listening_ = make_socket();
  const auto* const place = reinterpret_cast<const sockaddr*>(&address.value);
  if (bind(listening_.file(), place, address.size) == 0) ::listen(listening_.file(), 2);
}

void Channel::connect() {
  const Address address = address_of(name_);
  for (Socket& socket : sockets_) {
    Socket made = end_ == 0 ? Socket(accept4(listening_.file(), nullptr, nullptr, SOCK_CLOEXEC))
                            : make_socket();
    const auto* const place = reinterpret_cast<const sockaddr*>(&address.value);
    while (end_ == 1 && ::connect(made.file(), place, address.size) != 0) {
      const std::lock_guard lock(mutex_);
      if (has_ended_) return;
      std::this_thread::sleep_for(kPause);
    }
    const std::lock_guard lock(mutex_);
    if (has_ended_) return;
    socket = std::move(made);
  }
}

bool Channel::meet() {
  char byte = 0;
  const bool met = sockets_[end_].write(&byte, 1) && sockets_[1 - end_].read(&byte, 1);
  return met || wait_for_end();
}

bool Channel::send(const void* data, std::size_t num_bytes) {
  const Socket& socket = sockets_[end_];
  const std::uint64_t size = num_bytes;
  char taken = 0;
  const bool done =
      socket.write(&size, sizeof(size)) && socket.write(data, num_bytes) && socket.read(&taken, 1);
  return done || wait_for_end();
}

bool Channel::receive(void* data, std::size_t num_bytes) {
  const Socket& socket = sockets_[1 - end_];
  std::uint64_t size = 0;
  if (!socket.read(&size, sizeof(size))) return wait_for_end();
  if (size != num_bytes) {
    const std::lock_guard lock(mutex_);
    fails_ = true;
    return false;
  }
  const char taken = 1;
  return (socket.read(data, num_bytes) && socket.write(&taken, 1)) || wait_for_end();
}

// The other end is gone: as NCCL's kernels, this one does not know.
bool Channel::wait_for_end() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return has_ended_; });
  return false;
}

void Channel::end() {
  const std::lock_guard lock(mutex_);
  has_ended_ = true;
  listening_.end();
  for (const Socket& socket : sockets_) socket.end();
  changed_.notify_all();
}

bool Channel::fails() {
  const std::lock_guard lock(mutex_);
  return fails_;
}

}  // namespace simulated
