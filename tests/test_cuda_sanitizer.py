"""compute-sanitizer over the CUDA kernels on small shapes; needs a GPU that it accepts."""

import functools
import os
import shutil
import subprocess
import sys

import pytest

from capsule_kernels.backends import cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        cuda.unavailable() is not None, reason=f"backend cuda: {cuda.unavailable()}"
    ),
]

ROUTE = """
import torch
from capsule_kernels import fused_routing
for B, I, J, D, sharing in ((33, 12, 10, 16, 1), (5, 12, 3, 10, 4)):
    u = torch.randn(B, I, 8, device="cuda", requires_grad=True)
    weight = torch.randn(I // sharing, J, D, 8, device="cuda", requires_grad=True)
    logits = torch.randn(I, J, device="cuda", requires_grad=True)
    bias = torch.randn(J, D, device="cuda", requires_grad=True)
    v = fused_routing(
        u, weight, 3, logits=logits, bias=bias, weight_sharing=sharing, backend="cuda"
    )
    v.sum().backward()
torch.cuda.synchronize()
"""
NOTHING = "import torch; torch.ones(1, device='cuda').cpu()"


def sanitized(tool: str, program: str) -> subprocess.CompletedProcess[str]:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer was not found on the PATH")
    return subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "42", sys.executable, "-c", program],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )


@functools.cache
def refusal() -> str | None:
    """What compute-sanitizer says where it can't work with this device at all."""
    result = sanitized("memcheck", NOTHING)
    return None if result.returncode == 0 else (result.stdout + result.stderr)[-500:]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_no_complaint(tool: str) -> None:
    if refusal() is not None:
        pytest.skip(f"compute-sanitizer does not work with this device: {refusal()}")
    result = sanitized(tool, ROUTE)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
