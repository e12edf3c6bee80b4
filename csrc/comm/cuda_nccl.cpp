#include "comm/cuda_nccl.h"

#include <cuda_runtime_api.h>
#include <link.h>
#include <nccl.h>

#include <algorithm>
#include <cstring>
#include <filesystem>

#include "common/error.h"
#include "device/cuda_current.h"

namespace dualpipe {
namespace {

static_assert(sizeof(ncclUniqueId) == sizeof(Invitation));
static_assert(static_cast<int>(ncclRemoteError) == static_cast<int>(NcclResult::kRemoteError));
static_assert(static_cast<int>(ncclInProgress) == static_cast<int>(NcclResult::kInProgress));
static_assert(NCCL_VERSION_CODE >= NCCL_VERSION(2, 22, 0), "communicators are aborted together");

NcclResult result_of(ncclResult_t result) { return static_cast<NcclResult>(result); }
ncclComm_t comm_of(NcclHandle comm) { return static_cast<ncclComm_t>(comm); }
cudaStream_t stream_of(const Stream& stream) { return static_cast<cudaStream_t>(stream.handle()); }

// NCCL makes a new communicator on the thread's current device.
class RealNccl final : public NcclCalls {
 public:
  explicit RealNccl(int device) : device_(device) {}

  NcclResult get_unique_id(Invitation* id) override {
    const OnDevice here(device_);
    ncclUniqueId native;
    const ncclResult_t result = ncclGetUniqueId(&native);
    std::memcpy(id->data(), &native, sizeof(native));
    return result_of(result);
  }

  NcclResult init_pair(NcclHandle* comm, const Invitation& id, int index,
                       const NcclOptions& options) override {
    const OnDevice here(device_);
    ncclUniqueId native;
    std::memcpy(&native, id.data(), sizeof(native));
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 1;
    if (options.max_ctas > 0) {
      config.minCTAs = 1;
      config.maxCTAs = options.max_ctas;
    }
    return result_of(
        ncclCommInitRankConfig(reinterpret_cast<ncclComm_t*>(comm), 2, native, index, &config));
  }

  NcclResult group_start() override { return result_of(ncclGroupStart()); }
  // NCCL leaves a context on whichever device is the thread's current one.
  NcclResult group_end() override {
    const OnDevice here(device_);
    return result_of(ncclGroupEnd());
  }

  NcclResult send(const void* data, std::size_t num_bytes, int peer, NcclHandle comm,
                  Stream& stream) override {
    return result_of(ncclSend(data, num_bytes, ncclUint8, peer, comm_of(comm), stream_of(stream)));
  }
  NcclResult receive(void* data, std::size_t num_bytes, int peer, NcclHandle comm,
                     Stream& stream) override {
    return result_of(ncclRecv(data, num_bytes, ncclUint8, peer, comm_of(comm), stream_of(stream)));
  }

  NcclResult async_error(NcclHandle comm, NcclResult* state) override {
    ncclResult_t native = ncclSuccess;
    const ncclResult_t result = ncclCommGetAsyncError(comm_of(comm), &native);
    *state = result_of(native);
    return result_of(result);
  }

  NcclResult abort(const std::vector<NcclHandle>& comms) override {
    const OnDevice here(device_);
    ncclResult_t worst = ncclGroupStart();
    for (const NcclHandle comm : comms) worst = std::max(worst, ncclCommAbort(comm_of(comm)));
    return result_of(std::max(worst, ncclGroupEnd()));
  }

  std::string describe(NcclResult result) override {
    const char* const last = ncclGetLastError(nullptr);
    const std::string text = ncclGetErrorString(static_cast<ncclResult_t>(result));
    const bool has_more = last != nullptr && *last != '\0';
    return has_more ? cat("NCCL: ", text, " (", last, ")")
                    : cat("NCCL: ", text, "; NCCL_DEBUG=WARN tells more");
  }

 private:
  const int device_;
};

int note_nccl(dl_phdr_info* info, std::size_t, void* found) {
  const std::filesystem::path path(info->dlpi_name);
  if (path.filename().string().rfind("libnccl.so", 0) == 0) {
    static_cast<std::vector<std::string>*>(found)->push_back(path.string());
  }
  return 0;
}

}  // namespace

std::vector<std::string> loaded_nccls() {
  std::vector<std::string> found;
  dl_iterate_phdr(note_nccl, &found);
  return found;
}

std::string nccl_version() {
  int code = 0;
  if (ncclGetVersion(&code) != ncclSuccess) return "unknown";
  return cat(code / 10'000, ".", code / 100 % 100, ".", code % 100);
}

void require_one_nccl() {
  const std::vector<std::string> found = loaded_nccls();
  DUALPIPE_USER_CHECK(found.size() < 2, "this process has two NCCLs, ", found[0], " and ", found[1],
                      "; torch needs its own: remove the other one from LD_PRELOAD, "
                      "LD_LIBRARY_PATH or the environment");
}

std::shared_ptr<NcclCalls> nccl_calls(int device) {
  require_one_nccl();
  return std::make_shared<RealNccl>(device);
}

}  // namespace dualpipe
