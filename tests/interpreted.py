"""Tests run with Triton's kernels interpreted.

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


def marked(test: Callable[..., None]) -> Callable[..., None]:
    """``MARKS`` on one test, in a file that has others."""
    for mark in MARKS:
        test = mark(test)
    return test


def environment(*, covered: bool = False) -> dict[str, str]:
    """Of a process with the interpreter. ``covered``: its lines are counted where this one's are,
    which more than doubles the time; test_triton_interpreted.py says which tests reach nearly all
    of them."""
    kept = {n: value for n, value in os.environ.items() if covered or "COVERAGE" not in n}
    return kept | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def check_in_the_interpreter(
    files: str,
    chosen: str,
    figure: Callable[[str, str], None] | None = None,
    *,
    covered: bool = False,
) -> None:
    """The chosen tests of some files pass, none is skipped, and what they print is printed."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(f"tests/{file}" for file in files.split())],
        cwd=Path(__file__).parent.parent,
        env=environment(covered=covered),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout
    printed = ("properties, triton-cpu", "ranges, triton-cpu", "repeats of the interpreted Triton")
    for line in done.stdout.splitlines() if figure is not None else ():
        what, separator, amount = line.rpartition(": ")
        if separator and what.startswith(printed):
            figure(what, amount)
