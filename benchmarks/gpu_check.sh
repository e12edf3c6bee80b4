#!/usr/bin/env bash
# On a machine with one GPU and no network: builds the extension with CUDA, runs the tests that need
# a GPU, and leaves their outcome in OUT (default: gpu_check/): gpu_check.json, gpu_check.md.
# Needs torch with CUDA, pytest and pytest-timeout, and NCCL 2.30 or newer (several ranks share the
# GPU); NCCL_LIBRARY names one that is not torch's own.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-gpu_check}
mkdir -p "$out"
export DUALPIPE_EXT_CUDA=1 PYTHONPATH=$PWD
export CUDA_DEVICE_MAX_CONNECTIONS=32 NCCL_MULTI_RANK_GPU_ENABLE=1
if [[ -n ${NCCL_LIBRARY:-} ]]; then export LD_PRELOAD=$NCCL_LIBRARY; fi

python -m dualpipe_ext build
python -m dualpipe_ext info | tee "$out/info.txt"
status=0
python -m pytest -m gpu --junit-xml "$out/tests.xml" tests/python/test_gpu.py || status=$?
python benchmarks/gpu_report.py "$out"
exit $status
