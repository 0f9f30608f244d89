"""CUDA C++ kernels (none yet)."""

import torch

SERVES = "CUDA tensors"


def unavailable() -> str | None:
    return "its kernels are not written yet"


def unsupported(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    return None
