"""compute-sanitizer over small calls of the GPU backends; needs a GPU that it accepts."""

import functools
import os
import shutil
import subprocess
import sys

import pytest

from bench.report import SANITIZER_TOOLS
from bench.sources import ROOT
from capsule_kernels.backends import cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        cuda.unavailable() is not None, reason=f"backend cuda: {cuda.unavailable()}"
    ),
]

CALLS = ["-m", "bench.small_calls"]
NOTHING = ["-c", "import torch; torch.ones(1, device='cuda').cpu()"]


def sanitized(tool: str, program: list[str]) -> subprocess.CompletedProcess[str]:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer was not found on the PATH")
    return subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "42", sys.executable, *program],
        cwd=ROOT,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )


@functools.cache
def refusal() -> str | None:
    """What compute-sanitizer says where it can't work with this device at all."""
    result = sanitized("memcheck", NOTHING)
    return None if result.returncode == 0 else (result.stdout + result.stderr)[-500:]


@pytest.mark.parametrize("tool", SANITIZER_TOOLS)
def test_no_complaint(tool: str) -> None:
    if refusal() is not None:
        pytest.skip(f"compute-sanitizer does not work with this device: {refusal()}")
    result = sanitized(tool, CALLS)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
