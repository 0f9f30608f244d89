"""Triton kernels: CUDA from compute capability 8.0 and HIP; CPU tensors under the interpreter.

Importing this package does not import Triton; the first call does.
"""

import importlib.util
import os

import torch
from torch import Tensor

from .config import MAX_DIMENSION
from .device import does_not_fit, gpu_of

SERVES = "CUDA (compute capability 8.0 and up) and HIP tensors, every dtype"

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # what Triton itself reads when imported


def unavailable() -> str | None:
    if not INSTALLED:
        return "Triton is not installed; `pip install triton` installs it"
    if not INTERPRETED and not torch.cuda.is_available():
        return (
            "no CUDA or HIP device is visible; TRITON_INTERPRET=1, set before Python starts, runs "
            "the kernels on CPU tensors, very slowly"
        )
    return None


def unsupported(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    _, J, K, D, *_ = shape
    if D > MAX_DIMENSION:
        return f"a tile of Triton has at most {MAX_DIMENSION} elements, and D = {D} is more"
    if device.type == "cpu":
        if INTERPRETED:
            return None
        return (
            "it takes CUDA or HIP tensors, got tensors on cpu; move them to the GPU, or set "
            "TRITON_INTERPRET=1 before Python starts to interpret the kernels"
        )
    if device.type != "cuda":
        return f"it takes CUDA or HIP tensors, got tensors on {device}"
    if torch.version.hip is None:
        properties = torch.cuda.get_device_properties(device)
        if properties.major < 8:
            return (
                f"it needs compute capability 8.0 or higher, {properties.name} has "
                f"{properties.major}.{properties.minor}; use backend='reference'"
            )
    # In other types something always fits. A traced call is not asked: the operator says it then.
    if dtype == torch.float64 and not torch.compiler.is_compiling():
        return does_not_fit(gpu_of(device), dtype, J, D, K)
    return None


def routing_forward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """``capsule_kernels::routing_forward`` (arguments and results: ``ops.FORWARD_SCHEMA``)."""
    from .launch import routing_forward

    return routing_forward(*arguments[:9])  # without full_gradient


def routing_backward(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``capsule_kernels::routing_backward`` (arguments and results: ``ops.BACKWARD_SCHEMA``)."""
    from .launch import routing_backward

    return routing_backward(*arguments)
