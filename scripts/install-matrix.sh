#!/usr/bin/env bash
# Installs the sdist, by way of a wheel, into clean environments and tests each: a row of a Markdown
# table for every environment.
#   scripts/install-matrix.sh [ROW...]   a row is PYTHON:TORCH:TRITON:COMPILER, TORCH a version,
#                                        TRITON a version, "own" (what torch brings) or "no",
#                                        COMPILER "yes" or "no"; python3.13t:2.12.0:own:yes is
#                                        a row of a free-threaded Python, and not a usual one
# Environments are made below build/install and removed again. Builds of torch with CUDA need 6 GB.
set -euo pipefail
cd "$(dirname "$0")/.."
ROWS=("$@")
if [ $# = 0 ]; then
  ROWS=(python3.11:2.9.0:own:yes python3.11:2.13.0:3.6.0:yes python3.11:2.13.0:no:yes
    python3.11:2.13.0:no:no python3.13:2.14.1:own:yes)
fi
# Tests of the package that do not need its source tree.
TESTS="autocast bad_input compile conv conv_kernels cpu determinism double_backward gradients_needed
  layouts module odd_inputs opcheck operator_fuzz overloads range reference threads transforms
  triton_checks triton_choice triton_config triton_launches validation"
DIRECTORY=$PWD/build/install
unset PYTHONPATH

fail() {
  echo "install-matrix: $1" >&2
  exit 1
}

# install_and_test PYTHON TORCH TRITON COMPILER: prints the row.
install_and_test() {
  local python=$1 torch=$2 triton=$3 compiler=$4 env=$DIRECTORY/env log=$DIRECTORY/log
  rm -rf "$DIRECTORY"
  mkdir -p "$DIRECTORY/tests"
  "$python" -m venv "$env" || fail "$python makes no environment"
  pip() { "$env/bin/python" -m pip --quiet --disable-pip-version-check "$@" >>"$log" 2>&1; }
  # What is built from source where there is no wheel takes longer than all else.
  pip install --prefer-binary "torch==$torch" numpy "setuptools>=77" wheel ninja pybind11 pytest rich ||
    fail "torch $torch can't be installed with $python: $(tail -1 "$log")"
  case $triton in
  own) ;;
  no) pip uninstall --yes triton ;;
  *) pip install "triton==$triton" || fail "triton $triton can't be installed" ;;
  esac
  export CAPSULE_KERNELS_CUDA=0 CXX=c++
  [ "$compiler" = yes ] || CXX=no-compiler
  "$env/bin/python" setup.py --quiet egg_info --egg-base "$DIRECTORY" \
    sdist --dist-dir "$DIRECTORY" >>"$log" 2>&1 || fail "no sdist: $(tail -1 "$log")"
  pip wheel --no-build-isolation --no-deps --wheel-dir "$DIRECTORY" "$DIRECTORY"/*.tar.gz ||
    fail "no wheel from the sdist: $(tail -1 "$log")"
  pip install --no-deps "$DIRECTORY"/*.whl || fail "the wheel does not install"

  # Beside the tests: the network that they compile, and how they measure memory.
  cp -r tests model bench pyproject.toml "$DIRECTORY/tests/"
  cd "$DIRECTORY/tests" # where the sources are not
  local status=0
  OMP_NUM_THREADS=1 "$env/bin/python" -m pytest -q -rfEs -m "not slow" \
    $(printf 'tests/test_%s.py ' $TESTS) >"$DIRECTORY/tests.log" 2>&1 || status=$?
  [ $status = 0 ] || grep -E "^(FAILED|ERROR)" "$DIRECTORY/tests.log" >&2 || true
  "$env/bin/python" - "$DIRECTORY/tests.log" "$compiler" <<'END'
import platform, re, sys
from collections import Counter
from pathlib import Path
import torch
from capsule_kernels import backends, fused_routing
try:
    from triton import __version__ as triton
except ImportError:
    triton = "none"
usable = ", ".join(name for name, status in backends().items() if status.usable)
u, weight = torch.randn(5, 6, 4, requires_grad=True), torch.randn(6, 3, 8, 4)
fused_routing(u, weight).sum().backward()
assert u.grad is not None and u.grad.isfinite().all()
log = Path(sys.argv[1]).read_text()
skipped = Counter()
for count, reason in re.findall(r"^SKIPPED \[(\d+)\] \S+: (.*)$", log, re.MULTILINE):
    skipped[reason] += int(count)
reasons = "; ".join(f"{count}: {reason}" for reason, count in skipped.most_common())
python = platform.python_version() + sys.abiflags
row = [python, torch.__version__, triton, sys.argv[2], usable]
print("|", " | ".join([*row, log.splitlines()[-1].strip("= "), reasons]), "|")
END
  return $status
}

echo "| Python | torch | Triton | compiler | usable backends | tests | why skipped |"
echo "|---|---|---|---|---|---|---|"
status=0
for row in "${ROWS[@]}"; do
  IFS=: read -r python torch triton compiler <<<"$row"
  (install_and_test "$python" "$torch" "$triton" "$compiler") || status=1
done
rm -rf "$DIRECTORY"
exit $status
