#!/usr/bin/env bash
# The C++ extension under sanitizers (GCC on Linux), each in a build of its own below build/.
#   scripts/sanitize.sh address   AddressSanitizer and UndefinedBehaviorSanitizer: tests of the CPU
#                                 backend, then CAPSULE_FUZZ_CALLS (100000) calls of the raw operators
#   scripts/sanitize.sh thread    ThreadSanitizer: the kernels on std::thread, all of it instrumented,
#                                 then the operators on torch's threads
# Ends with a line of figures, and an error if there was a finding.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PY:-$PWD/.venv/bin/python}
CALLS=${CAPSULE_FUZZ_CALLS:-100000}

# sanitized_build NAME FLAGS: the package and what tests it, in build/sanitize-NAME/lib.
sanitized_build() {
  directory=$PWD/build/sanitize-$1
  rm -rf "$directory/lib" "$directory"/finding.*
  # Torch compiles its part with CFLAGS. The kernels get -O1: with both sanitizers and -O3, GCC takes
  # many minutes for them, but can no longer see what is initialised.
  local flags="-g1 -fno-omit-frame-pointer $2" object
  CFLAGS=$flags CAPSULE_KERNELS_CXXFLAGS="$flags -O1 -Wno-maybe-uninitialized" \
    LDFLAGS=$2 CAPSULE_KERNELS_CUDA=0 "$PY" setup.py --quiet \
    build --build-base "$directory" --build-temp "$directory/temp" --build-lib "$directory/lib"
  for object in "$directory"/temp/csrc/cpu/*.o "$directory"/temp/*/csrc/cpu/kernels.o; do
    if ! nm "$object" | grep -E "__(asan|tsan)_" >/dev/null; then
      echo "sanitize $1: $object was built without the sanitizer" >&2
      exit 1
    fi
  done
  cp -r tests "$directory/lib/"
}

# with_libraries FILE... -- ARGUMENT...: Python where it imports that build, after these libraries.
with_libraries() {
  local libraries=""
  while [ "$1" != -- ]; do
    libraries+=" $1"
    shift
  done
  (cd "$directory/lib" && LD_PRELOAD=$libraries "$PY" "${@:2}")
}

runtime() { gcc -print-file-name="$1"; }

# report NAME STATUS WHAT: shows what the sanitizer wrote to its files, and counts it.
report() {
  local findings
  cat "$directory"/finding.* 2>/dev/null | grep -v "failed to allocate" >&2 || true
  findings=$(cat "$directory"/finding.* 2>/dev/null |
    grep -cE "(ERROR|WARNING): (Address|Thread)Sanitizer: |runtime error: " || true)
  echo "sanitize $1: $findings findings; $3"
  exit $(($2 || findings))
}

address() {
  sanitized_build address "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all"
  # Python frees little when it ends, so leaks are not looked for. What no memory could hold is
  # refused, as it is without sanitizers.
  export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096
  ASAN_OPTIONS+=:log_path=$directory/finding
  export UBSAN_OPTIONS=print_stacktrace=1:log_path=$directory/finding
  local libraries status=0
  libraries=("$(runtime libasan.so)" "$(runtime libstdc++.so)")
  {
    with_libraries "${libraries[@]}" -- -m pytest -q -p no:cacheprovider \
      tests/test_cpu.py tests/test_conv_kernels.py tests/test_odd_inputs.py tests/test_threads.py &&
      with_libraries "${libraries[@]}" -- -m tests.operator_fuzz --calls "$CALLS" --threads 2 \
        --memory-gib 0
  } || status=1
  report address $status "tests of the CPU backend and $CALLS raw calls in $SECONDS s"
}

thread() {
  sanitized_build thread -fsanitize=thread
  export TSAN_OPTIONS=log_path=$directory/finding:suppressions=$PWD/tests/sanitizers/thread.supp
  g++ -std=c++17 -O1 -g1 -fsanitize=thread tests/sanitizers/threads.cpp \
    "$directory"/temp/csrc/cpu/dispatch.o "$directory"/temp/*/csrc/cpu/kernels.o \
    -o "$directory/threads"
  gcc -O1 -g1 -shared -fPIC tests/sanitizers/openmp.c -o "$directory/openmp.so"
  local torch_library status=0
  torch_library=$("$PY" -c "import torch; print(torch.__path__[0] + '/lib')")
  # ThreadSanitizer wants memory where it expects it: addresses are not randomised.
  {
    setarch --addr-no-randomize "$directory/threads" &&
      with_libraries "$(runtime libtsan.so)" "$directory/openmp.so" \
        "$torch_library"/libgomp*.so* -- -m pytest -q -p no:cacheprovider tests/test_threads.py
  } || status=1
  report thread $status "kernels on std::thread, operators on torch's threads in $SECONDS s"
}

case ${1:-} in
address | thread) "$1" ;;
*)
  echo "usage: $0 address | thread" >&2
  exit 2
  ;;
esac
