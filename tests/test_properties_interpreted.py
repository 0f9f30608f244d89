"""The properties and ranges of every backend, for the interpreted Triton kernels, on few examples.

Triton reads TRITON_INTERPRET when it is imported, hence the processes of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from capsule_kernels.backends import triton


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.skipif(not triton.INSTALLED, reason="Triton is not installed")
@pytest.mark.skipif(triton.INTERPRETED, reason="this is the process with TRITON_INTERPRET=1")
@pytest.mark.parametrize("file", ["test_properties.py", "test_range.py"])
def test_in_the_interpreter(file, figure):
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", "triton-cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"tests/{file}"],
        cwd=Path(__file__).parent.parent,
        env=os.environ
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
        if separator and what.startswith("properties, triton-cpu"):
            figure(what, amount)
