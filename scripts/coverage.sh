#!/usr/bin/env bash
# Runs all tests and says what they cover: lines and branches of the Python code, lines of the C++
# code for CPUs. Ends with a line of figures for each; too little is an error.
# JOBS: processes for the tests (2).
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PY:-$PWD/.venv/bin/python}
export OMP_NUM_THREADS=1 COVERAGE_FILE=$PWD/build/coverage/python
DIRECTORY=$PWD/build/coverage
rm -rf "$DIRECTORY"
mkdir -p "$DIRECTORY"

"$PY" -m coverage run -m pytest tests --numprocesses "${JOBS:-2}" --dist loadfile --no-loadscope-reorder
"$PY" -m coverage combine --quiet
status=0
"$PY" -m coverage report || status=1

# A build of its own counts what C++ runs, in the tests that are about it. Torch compiles its part
# with CFLAGS. Optimised in full, the kernels would take nine times as long to compile; ranges of
# values (vrp) alone leave out most instances of templates that nothing calls, as that does.
CFLAGS=--coverage CAPSULE_KERNELS_CXXFLAGS="--coverage -Og -ftree-vrp" LDFLAGS=--coverage \
  CAPSULE_KERNELS_CUDA=0 \
  "$PY" setup.py --quiet \
  build --build-base "$DIRECTORY" --build-temp "$DIRECTORY/temp" --build-lib "$DIRECTORY/lib"
cp -r tests pyproject.toml "$DIRECTORY/lib/"
(cd "$DIRECTORY/lib" && "$PY" -m pytest -q -p no:cacheprovider --numprocesses "${JOBS:-2}" tests/test_cpu.py \
  tests/test_odd_inputs.py tests/test_gradients_needed.py tests/test_conv_kernels.py \
  tests/test_operator_fuzz.py -k "not triton_operators")
# Counts of several threads may be lost, some so that a branch's becomes negative: lines stay right.
lines=$("$PY" -m gcovr --root . --object-directory "$DIRECTORY/temp" --filter csrc/ \
  --gcov-ignore-parse-errors negative_hits.warn_once_per_file "$DIRECTORY/temp" \
  --txt "$DIRECTORY/cpp.txt" --print-summary --fail-under-line 90 | grep ^lines) || status=1
cat "$DIRECTORY/cpp.txt"
echo "coverage of the Python code, lines and branches: $("$PY" -m coverage report --format total --precision 1) %"
echo "coverage of the C++ code for CPUs, $lines"
exit $status
