"""Tests of every backend, run for the interpreted Triton kernels.

Triton reads TRITON_INTERPRET when it is imported, hence a process of its own.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from capsule_kernels.backends import triton

MARKS = [
    pytest.mark.interpreter,
    pytest.mark.slow,
    pytest.mark.skipif(not triton.INSTALLED, reason="Triton is not installed"),
    pytest.mark.skipif(triton.INTERPRETED, reason="this is the process with TRITON_INTERPRET=1"),
]


def check_in_the_interpreter(file: str, chosen: str, figure: Callable[[str, str], None]) -> None:
    """The chosen tests of a file pass, none is skipped, and what they print is printed."""
    # Not under coverage, which doubles the time: test_triton_interpreter.py reaches the same lines.
    environment = {name: value for name, value in os.environ.items() if "COVERAGE" not in name}
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"tests/{file}"],
        cwd=Path(__file__).parent.parent,
        env=environment
        | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout
    for line in done.stdout.splitlines():
        what, separator, amount = line.rpartition(": ")
        if separator and what.startswith(("properties, triton-cpu", "ranges, triton-cpu")):
            figure(what, amount)
