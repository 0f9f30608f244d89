#!/bin/sh
# Builds the extension with its CUDA kernels against a CUDA build of torch and imports it: a proof
# that needs nvcc, but no GPU.
#
#   PYTHON          a Python whose torch has CUDA; without it one is set up in build/cuda-venv
#                   (5 GB, downloaded once)
#   CUDA_HOME       the CUDA toolkit; without it, the one that nvcc on the PATH belongs to
#   TORCH_CUDA_ARCH_LIST, MAX_JOBS   as for every torch extension; all architectures and 1 by default
set -eu
cd "$(dirname "$0")/.."

if [ -z "${CUDA_HOME:-}" ]; then
    if ! command -v nvcc >/dev/null; then
        echo "cuda-build: nvcc was not found: set CUDA_HOME or put nvcc on the PATH" >&2
        exit 1
    fi
    # nvcc on the PATH may be a wrapper somewhere else: it knows best where its toolkit is.
    CUDA_HOME=$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
    CUDA_HOME=$(cd "$CUDA_HOME" && pwd -P)
fi
export CUDA_HOME
export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-8.0 9.0 10.0}"
export MAX_JOBS="${MAX_JOBS:-1}"
export CAPSULE_KERNELS_CUDA=1

if [ -z "${PYTHON:-}" ]; then
    PYTHON=$PWD/build/cuda-venv/bin/python
    if [ ! -x "$PYTHON" ]; then
        python3 -m venv build/cuda-venv
        "$PYTHON" -m pip install --quiet torch==2.14.1 numpy ninja pybind11 "setuptools>=77" wheel
    fi
fi
# ninja is looked for on the PATH.
PATH=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH
export PATH

echo "cuda-build: CUDA_HOME=$CUDA_HOME, architectures $TORCH_CUDA_ARCH_LIST"
"$PYTHON" setup.py --quiet build --build-temp build/cuda-objects --build-lib build/cuda
cd build/cuda
"$PYTHON" - <<'END'
import torch
import capsule_kernels
from capsule_kernels.backends import extension

assert extension.module is not None, extension.missing
assert extension.module.cuda_targets
for operator in ("routing_forward.cuda", "routing_backward.cuda"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"capsule_kernels::{operator}", "CUDA")
status = capsule_kernels.backends()["cuda"]
print(f"cuda-build: with code for {extension.module.cuda_targets}")
print(f"cuda-build: {extension.module.__file__} imports with torch {torch.__version__}")
print(f"cuda-build: backend cuda usable here: {status.usable} ({status.reason})")
END
