"""C++ kernels for CPUs (``csrc/cpu``), registered by the compiled extension."""

import torch

from . import extension

SERVES = "CPU tensors, every dtype and shape (C++, SIMD chosen at run time)"


def unavailable() -> str | None:
    return extension.missing


def unsupported(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    if device.type != "cpu":
        return f"it takes CPU tensors, got tensors on {device}"
    return None
