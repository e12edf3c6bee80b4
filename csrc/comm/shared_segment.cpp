#include "comm/shared_segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <random>
#include <utility>

#include "common/error.h"

namespace dualpipe {
namespace {

// The segments of this process by name, so that a thread finds what another one has mapped. Never
// destroyed: segments may outlive it at exit.
struct Registry {
  std::mutex mutex;
  std::map<std::string, std::weak_ptr<SharedSegment>> segments;
};

Registry& registry() {
  static auto& all = *new Registry;
  return all;
}

// Where shm_open() keeps its files; the call itself is in a separate library on older systems.
std::string path_of(const std::string& name) { return "/dev/shm/" + name; }

std::string new_name() {
  std::random_device random;
  return cat("dualpipe-", getpid(), "-", std::hex, random(), random(), random(), random());
}

[[noreturn]] void fail(const char* what, const std::string& name) {
  throw PipelineError(cat(what, " ", path_of(name), ": ", std::strerror(errno)));
}

struct flock lock_of(int side) {
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = side;
  lock.l_len = 1;
  return lock;
}

}  // namespace

SharedSegment::SharedSegment(std::string name, int file, std::size_t num_bytes)
    : name_(std::move(name)), file_(file), num_bytes_(num_bytes) {
  void* const mapped = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (mapped == MAP_FAILED) {
    const int error = errno;
    (void)unlink(path_of(name_).c_str());
    (void)close(file);
    errno = error;
    fail("cannot map", name_);
  }
  data_ = static_cast<std::byte*>(mapped);
}

SharedSegment::~SharedSegment() {
  {
    const std::lock_guard lock(registry().mutex);
    registry().segments.erase(name_);
  }
  made_.reset();
  (void)unlink(path_of(name_).c_str());  // if nobody has opened it
  (void)munmap(data_, num_bytes_);
  (void)close(file_);
}

std::shared_ptr<SharedSegment> SharedSegment::create(std::size_t num_bytes) {
  const std::string name = new_name();
  const int file = ::open(path_of(name).c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (file < 0) fail("cannot create", name);
  // Setting the file's length alone would reserve no memory: the first write could then raise a
  // fatal signal.
  if (const int error = posix_fallocate(file, 0, static_cast<off_t>(num_bytes)); error != 0) {
    (void)unlink(path_of(name).c_str());
    (void)close(file);
    errno = error;
    fail("cannot get memory (a container may limit it: --shm-size) for", name);
  }
  const std::shared_ptr<SharedSegment> made(new SharedSegment(name, file, num_bytes));
  const std::lock_guard lock(registry().mutex);
  registry().segments.emplace(name, made);
  return made;
}

std::shared_ptr<SharedSegment> SharedSegment::open(const std::string& name, std::size_t num_bytes) {
  {
    const std::lock_guard lock(registry().mutex);
    const auto found = registry().segments.find(name);
    if (found != registry().segments.end()) {
      if (auto segment = found->second.lock()) {
        (void)unlink(path_of(name).c_str());
        return segment;
      }
    }
  }
  const int file = ::open(path_of(name).c_str(), O_RDWR | O_CLOEXEC);
  if (file < 0) fail("cannot open", name);
  (void)unlink(path_of(name).c_str());
  return std::shared_ptr<SharedSegment>(new SharedSegment(name, file, num_bytes));
}

void SharedSegment::join(int side) {
  const std::lock_guard lock(mutex_);
  struct flock own = lock_of(side);
  if (fcntl(file_, F_OFD_SETLK, &own) != 0) fail("cannot lock", name_);
  joined_here_[side] = true;
}

bool SharedSegment::is_joined(int side) {
  const std::lock_guard lock(mutex_);
  struct flock asked = lock_of(side);
  return joined_here_[side] || (fcntl(file_, F_OFD_GETLK, &asked) == 0 && asked.l_type != F_UNLCK);
}

std::shared_ptr<void> SharedSegment::once(const std::function<std::shared_ptr<void>()>& make) {
  const std::lock_guard lock(mutex_);
  if (!made_) made_ = make();
  return made_;
}

}  // namespace dualpipe
