# Two commands for a fresh clone:
#   make train   set everything up and train the CapsNet on handwritten digits
#   make test    set everything up and run the tests
# Both redo only what is out of date. Needs Python 3.11 or newer, a C++ compiler and make.

PYTHON ?= python3
TRITON ?= triton==3.6.0; sys_platform == 'linux'
JOBS ?= 2

VENV := .venv
PY := $(VENV)/bin/python
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/cpu/* csrc/cuda/*)
CPP := $(wildcard csrc/*.cpp csrc/cpu/* csrc/cuda/* tests/cuda_emulation/*.cpp tests/cuda_emulation/*.h tests/sanitizers/*.c*)

.PHONY: setup train test coverage sanitize install-matrix aarch64 lint format bench cpu-report gpu-report figures cuda-build clean

setup: $(VENV)/.extension

$(VENV)/.packages: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and f'capsule_kernels needs Python 3.11 or newer, $(PYTHON) is {sys.version.split()[0]}')"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --requirement requirements.txt
	$(PY) -c "import triton" 2>/dev/null || $(PY) -m pip install --quiet "$(TRITON)"
	@touch $@

$(VENV)/.extension: $(VENV)/.packages $(SOURCES)
	$(PY) -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

train: setup
	$(PY) -m model.train

test: setup
ifdef COVERAGE
	JOBS=$(JOBS) scripts/coverage.sh
else
	OMP_NUM_THREADS=1 $(PY) -m pytest tests --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
endif

# The same tests, and what they cover.
coverage:
	$(MAKE) test COVERAGE=1

sanitize: setup
	scripts/sanitize.sh address
	scripts/sanitize.sh thread

install-matrix:
	scripts/install-matrix.sh

# The CPU kernels on NEON, under an emulator.
aarch64:
	scripts/aarch64.sh

lint: $(VENV)/.packages
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.packages
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

bench: setup
	$(PY) -m bench

# REPORT: further options, as in REPORT="--results DIR --minutes 9".
cpu-report: setup
	$(PY) -m bench.report --device cpu $(REPORT)

gpu-report:
	@$(PYTHON) -c "import torch" 2>/dev/null || { echo "gpu-report: $(PYTHON) has no torch; PYTHON=... names one that has" >&2; exit 1; }
	@$(PYTHON) -m bench.report --device cuda $(REPORT)

figures: setup
	$(PY) scripts/fill_figures.py

cuda-build:
	scripts/cuda-build.sh

clean:
	rm -rf $(VENV) build *.egg-info capsule_kernels/*.so
