#!/usr/bin/env bash
# On a machine with one GPU and no network: builds the extension with CUDA, asks the GPU what nobody has
# written down, runs the tests that need a GPU and the benchmarks on it, and leaves in OUT (default:
# gpu_check/) what came of it: gpu_check.md, gpu_check.json, gpu_check.log. A step that fails or is
# over its time limit does not keep the next ones from running; the exit status is 1 if one did.
#
#   bash benchmarks/gpu_check.sh [first|second] [OUT]
#
# Each part takes under 9 minutes; without a name it is one after the other. The first one has ranks
# that are threads and messages by copy engines; the second one NCCL, and ranks that are processes. What
# the first one has left in OUT, of the same commit on the same machine, is in the second one's tables
# as well.
#
# Needs torch with CUDA, pytest, pytest-timeout and the package's own dependencies (pyproject.toml). In
# the environment:
#   NCCL_LIBRARY=FILE       NCCL 2.30 or newer where torch's is older: ranks share the GPU. Without
#                           one the step "nccl" fails, and nothing else is tried over NCCL
#   PEER_DUALPIPE=DIR       a checkout of deepseek-ai/DualPipe to measure beside ours
#   GPU_CHECK_SECONDS=530   for each part
#   GPU_CHECK_ONLY=REGEX    only the steps with such names, beside build, info, machine, mps, nccl
#   GPU_CHECK_COMMIT=...    what is checked, where that is no git checkout
#   GPU_CHECK_DEVICE=cpu    tries all of it out without a GPU; the numbers mean nothing
set -uo pipefail
cd "$(dirname "$0")/.."

parts=(first second)
if [[ ${1:-} == first || ${1:-} == second ]]; then
  parts=("$1")
  shift
fi
out=${1:-gpu_check}
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
log=$out/gpu_check.log
if [[ ${parts[0]} == first ]]; then
  : >"$log"
elif [[ -e $out/gpu_check.json ]]; then
  cp "$out/gpu_check.json" "$work/earlier.json"
fi
device=${GPU_CHECK_DEVICE:-cuda}
python=${PYTHON:-python3}
failed=0

needs=(torch filelock numpy yaml typer rich tqdm pytest pytest_timeout)
"$python" -c "import ${needs[*]/%/,} sys" || {
  echo "$python lacks a package that the check needs (${needs[*]}): install it first" >&2
  exit 2
}

# Torch from pip opens the first nvidia/nccl/lib/libnccl.so.* along sys.path by its full name, and beside
# a preloaded one that would be a second NCCL. A torch that is linked to the system's takes the preloaded one.
use_nccl() { # FILE
  local shadow=$work/shadow/nvidia/nccl/lib
  mkdir -p "$shadow"
  ln -s "$1" "$shadow/libnccl.so.2"
  if [[ $(PYTHONPATH=$work/shadow:$PYTHONPATH loaded_nccls) == "$1" ]]; then
    PYTHONPATH=$work/shadow:$PYTHONPATH
  else
    export LD_PRELOAD=$1
  fi
}

loaded_nccls() {
  "$python" -c 'import torch; print(*{m.split()[-1] for m in open("/proc/self/maps") if "nccl" in m})'
}

export GPU_CHECK_DEVICE=$device PYTHONUNBUFFERED=1
export DUALPIPE_EXT_CACHE=${DUALPIPE_EXT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/dualpipe_ext}
export PYTHONPATH=$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}
export COLUMNS=140
if [[ $device == cuda ]]; then
  export DUALPIPE_EXT_CUDA=1 CUDA_DEVICE_MAX_CONNECTIONS=32 NCCL_MULTI_RANK_GPU_ENABLE=1
  export CUBLAS_WORKSPACE_CONFIG=:4096:8 # the same bits from every stream
  # A kernel that needs more stack than any before it waits for the whole device to get it.
  export NCCL_SET_STACK_SIZE=1
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
  if [[ -n ${NCCL_LIBRARY:-} ]]; then
    library=$(realpath -e "$NCCL_LIBRARY") || exit 2
    use_nccl "$library"
  fi
fi

step() { # NAME LIMIT_S COMMAND...
  local name=$1 limit=$2 status=0 start=$SECONDS
  shift 2
  if [[ ! $name =~ ${GPU_CHECK_ONLY:-} && ! $name =~ ^(build|info|machine|mps|nccl)$ ]]; then
    return
  fi
  local left=$((deadline - SECONDS))
  if ((limit > left)); then limit=$left; fi
  printf '\n##### %s: %s\n' "$name" "$*" | tee -a "$log"
  if ((limit > 0)); then
    timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1 || status=$?
  else
    status=124
  fi
  if ((status)); then failed=1; fi
  printf '%s\t%s\t%s\t%s\n' "$name" "$status" $((SECONDS - start)) "${*//$work/WORK}" >>"$work/steps.tsv"
  printf '##### %s: status %s after %s s\n' "$name" "$status" $((SECONDS - start)) | tee -a "$log"
  "$python" benchmarks/gpu_report.py "$work" "$out" || failed=1
  return "$status"
}

bench() { # LIMIT_S NAME ARGUMENTS...; of NAME_nccl the script is NAME
  local limit=$1 name=$2
  shift 2
  step "$name" "$limit" "${around[@]}" "$python" "benchmarks/${name%_nccl}.py" --device "$device" \
    --json "$work/$name.json" "$@"
}

# A test over its limit takes along all that come after it: ranks' own limits are lower.
tests() { # NAME LIMIT_S ARGUMENTS...
  local name=$1 limit=$2
  shift 2
  export GPU_CHECK_OUTCOMES=$work/$name.outcomes
  step "$name" "$limit" "${around[@]}" "$python" -m pytest -q -m gpu -W default -p no:cacheprovider \
    -p gpu_outcomes --timeout 60 --session-timeout $((limit - 10)) "$@"
}

machine() { # HOW_PROCESSES_SHARE_THE_GPU
  step machine 60 "$python" benchmarks/gpu_report.py machine "$device" "$1" \
    "${sanitizer:-not installed, so nothing was checked with it}" "$work/machine.json"
}

# Without it the kernels of different processes take turns on the GPU and never run together.
start_mps() {
  command -v nvidia-cuda-mps-control >/dev/null || return 1
  mkdir -p "$work/mps" "$work/mps_log"
  timeout 20 env "${of_clients[@]}" nvidia-cuda-mps-control -d >>"$log" 2>&1 &&
    step mps 60 env "${of_clients[@]}" "$python" benchmarks/mps_clients.py
}

sanitize() { # TOOL TRANSPORT; a tool changes each kernel that is loaded, so not all of them
  step "$1_$2" 60 "$sanitizer" --tool "$1" --target-processes application-only \
    --error-exitcode 9 "$python" benchmarks/gpu_small_step.py --transport "$2"
}

finish() {
  if [[ -d $work/mps ]]; then
    echo quit | CUDA_MPS_PIPE_DIRECTORY=$work/mps timeout 10 nvidia-cuda-mps-control >/dev/null 2>&1
  fi
  rm -rf "$work"
}
trap finish EXIT

# Loading a kernel may wait for all that runs on the device: for the message, say, that another rank
# of the same process waits for. So where ranks are threads, everything is loaded before.
of_threads=() of_processes=() around=()
# MPS gives its clients hardware queues out of one pool, in which there are not 32 for each.
of_clients=("CUDA_MPS_PIPE_DIRECTORY=$work/mps" "CUDA_MPS_LOG_DIRECTORY=$work/mps_log"
  CUDA_DEVICE_MAX_CONNECTIONS=16)
if [[ $device == cuda ]]; then of_threads=(env CUDA_MODULE_LOADING=EAGER); fi
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)

few=() p2p=() short=() upstream=() gemm=() activations=() by_copies=copy
mirrors=(--ranks 2 --stage-ms 2 --gradient-mib 512)
if [[ $device == cpu ]]; then
  few=(--repeats 1)
  p2p=("${few[@]}" --mib 1) short=("${few[@]}" --chunks 8 --ranks 4)
  upstream=("${few[@]}" --chunks 8) gemm=("${few[@]}" --size 64 --products 6)
  mirrors=("${few[@]}" --chunks 8 --gradient-mib 1)
  activations=(--ranks 2 --chunks 4 --activation-mib 32 --message-kib 64) by_copies=host
fi
peer=()
if [[ -n ${PEER_DUALPIPE:-} ]]; then peer=(--peer-dualpipe "$PEER_DUALPIPE"); fi

is_built=
build() {
  if [[ -n $is_built ]]; then return; fi
  is_built=yes
  step build 240 "$python" -m dualpipe_ext build
  step info 30 "$python" -m dualpipe_ext info
}

first_part() {
  build
  machine ''
  step probe 100 "$python" benchmarks/gpu_probe.py --json "$work/probe.json"
  export GPU_CHECK_TRANSPORTS=$by_copies
  around=("${of_threads[@]}")
  bench 60 bench_p2p "${p2p[@]}"
  bench 45 bench_step "${short[@]}"
  bench 60 bench_overlap "${short[@]}"
  tests "tests_$by_copies" 100 tests/python/test_gpu.py tests/python/test_gpu_sizes.py
  if [[ $device == cuda ]]; then tests tests_device 60 tests/python/test_gpu_device.py; fi
  around=()
  if [[ $device == cuda && -n $sanitizer ]]; then
    sanitize memcheck copy
  elif [[ $device == cpu ]]; then
    step small_step 40 "$python" benchmarks/gpu_small_step.py --device cpu
  fi
}

# What is known to hang, if anything, comes last: ranks over NCCL.
second_part() {
  build
  processes='time slices'
  if [[ $device == cuda ]] && start_mps; then
    processes='MPS (tests: time slices)'
    of_processes=(env "${of_clients[@]}")
  fi
  machine "$processes"
  local transports=$by_copies
  if [[ $device == cuda ]] && step nccl 30 "$python" benchmarks/gpu_report.py nccl; then
    transports+=" nccl"
  elif [[ $device == cuda ]]; then
    peer=() # upstream communicates over NCCL alone
  fi
  export GPU_CHECK_TRANSPORTS=$transports
  around=("${of_processes[@]}")
  bench 60 bench_host_time "${few[@]}" "${peer[@]}"
  bench 60 bench_activations "${activations[@]}"
  bench 60 bench_mirrors "${mirrors[@]}"
  around=("${of_threads[@]}")
  bench 60 bench_gemm_slowdown "${gemm[@]}"
  around=()
  GPU_CHECK_TRANSPORTS=$by_copies tests tests_processes 90 tests/python/test_gpu_processes.py
  if ((${#peer[@]})); then
    around=(env CUDA_MODULE_LOADING=EAGER "${of_processes[@]}")
    bench 60 bench_overlap_upstream "${upstream[@]}" "${peer[@]}"
  fi
  if [[ $transports == *nccl ]]; then over_nccl; fi
}

over_nccl() {
  export GPU_CHECK_TRANSPORTS=nccl
  # Of its usual size, NCCL serves two ranks on a GPU; these tests have four. It overrides the sizes
  # that benchmarks ask for, so it is not for them.
  local small=(env NCCL_MAX_CTAS=2)
  around=("${of_threads[@]}")
  bench 40 bench_p2p_nccl
  bench 30 bench_step_nccl --ranks 2 --ranks 4 --ranks 8
  bench 40 bench_overlap_nccl
  around=("${small[@]}")
  tests tests_processes_nccl 90 tests/python/test_gpu_processes.py
  around=("${of_threads[@]}")
  tests tests_nccl 120 tests/python/test_gpu{,_device,_sizes}.py -k 'not processes'
  around=("${small[@]}")
  tests tests_sizes_nccl 90 tests/python/test_gpu_sizes.py -k processes
  if [[ -n $sanitizer ]]; then sanitize memcheck nccl; fi
}

for part in "${parts[@]}"; do
  deadline=$((SECONDS + ${GPU_CHECK_SECONDS:-530}))
  "${part}_part"
done
cat "$out/gpu_check.md"
exit "$failed"
