#pragma once

#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <string>
#include <utility>

namespace simulated {

// A socket that closes itself; none where `file` is negative.
class Socket {
 public:
  explicit Socket(int file = -1) : file_(file) {}
  Socket(Socket&& other) noexcept;
  Socket& operator=(Socket&& other) noexcept;
  ~Socket();

  [[nodiscard]] int file() const { return file_; }
  void end() const;  // who reads or writes, on either side, sees its end

  [[nodiscard]] bool write(const void* data, std::size_t num_bytes) const;  // whether all of it
  [[nodiscard]] bool read(void* data, std::size_t num_bytes) const;

 private:
  int file_;
};

// What the two ends of a communicator are connected by: threads of one process or of two. Each end
// sends on the socket of its own number; what the other has taken it says on the same one.
class Channel {
 public:
  Channel(std::string name, int end) : name_(std::move(name)), end_(end) {}

  void listen();  // end 0, before either connects; ends meet by the channel's name
  void connect();
  [[nodiscard]] bool meet();  // returns when the other end calls it, too

  // Return when the other end has done its part. False: the channel has ended, or the other end
  // gave another number of bytes, which then fails().
  bool send(const void* data, std::size_t num_bytes);
  bool receive(void* data, std::size_t num_bytes);

  void end();  // any thread: sends and receives return, those of the other end do not
  [[nodiscard]] bool fails();

 private:
  bool wait_for_end();

  const std::string name_;
  const int end_;
  Socket listening_;
  Socket sockets_[2];  // by the end that sends
  std::mutex mutex_;
  std::condition_variable changed_;
  bool has_ended_ = false;
  bool fails_ = false;
};

}  // namespace simulated
