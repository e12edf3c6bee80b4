#!/usr/bin/env bash
# Runs a command on a machine without a GPU as if it had one: README.md says what that means.
#
#   bash tests/simulated_gpu/run.sh COMMAND...
#
# Needs g++ and torch 2.11 or newer, built with CUDA 13, in the environment of PYTHON (python3).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
nvidia=$("$python" -c '
import os, nvidia
print(next((p for p in nvidia.__path__ if os.path.isdir(p + "/cu13/include")), ""))')
if [[ -z $nvidia ]]; then
  echo "$python has no headers of CUDA 13: install a build of torch for it" >&2
  exit 2
fi
# Of this name, so that who looks for the driver finds it loaded.
library=$work/libcuda.so.1
"${CXX:-g++}" -std=c++20 -O1 -fPIC -shared -pthread -Wall -Wextra -Werror \
  -isystem "$nvidia/cu13/include" -isystem "$nvidia/nccl/include" "$here"/*.cpp \
  -Wl,-soname,libcuda.so.1 -ldl -o "$library"

export PYTHONPATH=$here/python:$root:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=1 # the bits of a result must not depend on who computes it
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-32}
LD_PRELOAD=$library${LD_PRELOAD:+:$LD_PRELOAD} "$@"
