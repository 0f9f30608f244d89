#!/usr/bin/env bash
# The CPU kernels on an emulated aarch64, which has NEON: setup.py, in a Python of that architecture
# under qemu, builds them with a cross compiler, and the tests of the op run there.
#   scripts/aarch64.sh [ARGUMENT...]   of pytest; without any, the tests that need neither another
#                                      process nor a compiler at run time
# Needs Debian with its packages qemu-user-static and g++-aarch64-linux-gnu, arm64 among its
# architectures (dpkg --add-architecture arm64; apt-get update), and a Python 3.11 with pip.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3.11}
TORCH=${TORCH:-2.9.1}
DIRECTORY=$PWD/build/aarch64
ROOT=$DIRECTORY/root
SITE=$DIRECTORY/site-$TORCH
TREE=$DIRECTORY/tree

if [ ! -x "$ROOT/usr/bin/python3.11" ]; then
  mkdir -p "$DIRECTORY/packages" "$ROOT"
  names="libc6 libgcc-s1 libstdc++6 libgomp1 zlib1g libbz2-1.0 liblzma5 libexpat1 libffi8 libssl3
    libcrypt1 libuuid1 libsqlite3-0 libpython3.11-minimal libpython3.11-stdlib libpython3.11-dev
    python3.11-minimal python3.11"
  (cd "$DIRECTORY/packages" && apt-get download $(printf '%s:arm64 ' $names))
  for package in "$DIRECTORY"/packages/*.deb; do dpkg-deb -x "$package" "$ROOT"; done
fi

if [ ! -d "$SITE" ]; then
  "$PYTHON" -m pip install --quiet --no-deps --target "$SITE" --only-binary=:all: \
    --python-version 3.11 --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 \
    "torch==$TORCH" numpy filelock fsspec jinja2 markupsafe mpmath networkx sympy \
    typing_extensions pybind11 setuptools pytest hypothesis sortedcontainers attrs iniconfig \
    packaging pluggy pygments
fi

# Programs that it starts run outside of the emulation, so the cross compiler is at full speed.
emulated() {
  CPLUS_INCLUDE_PATH=$ROOT/usr/include/python3.11:$ROOT/usr/include PYTHONPATH=$TREE:$SITE \
    PYTHONNOUSERSITE=1 qemu-aarch64-static -L "$ROOT" "$ROOT/usr/bin/python3.11" "$@"
}

mkdir -p "$TREE"
cp -r setup.py pyproject.toml README.md LICENSE csrc capsule_kernels bench model tests "$TREE/"
rm -f "$TREE"/capsule_kernels/*.so
cd "$TREE"
CC=aarch64-linux-gnu-gcc CXX=aarch64-linux-gnu-g++ emulated setup.py --quiet build_ext --inplace
if [ $# = 0 ]; then
  set -- $(printf 'tests/test_%s.py ' cpu range odd_inputs regressions reference module \
    gradients_needed opcheck layouts autocast double_backward window_memory validation)
  set -- "$@" -k "not triton and not extension_that and not extension_of"
fi
OMP_NUM_THREADS=1 emulated -m pytest -q -p no:cacheprovider "$@"
