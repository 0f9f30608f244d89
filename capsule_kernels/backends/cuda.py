"""CUDA C++ kernels (``csrc/cuda``), registered by the compiled extension where it has CUDA.

A warp keeps the predictions of a tile of 16 samples in registers, and the grid keeps W in shared
memory through all iterations: what does not fit is left to Triton.
"""

import functools
from typing import NamedTuple

import torch

from . import extension

SERVES = (
    "CUDA tensors on sm_80 and up, float32, bfloat16 and float16, where a sample's outputs fit in "
    "registers (J * 8 * ceil(D / 8) <= 160, D <= 32) and weight fits in shared memory"
)

# As in csrc/cuda/plan.h.
MAX_FRAGMENTS = 20
FRAGMENT_BYTES = 16 * 8 * 4
SWEEP_WARPS = 8


class Figures(NamedTuple):
    """What the kernels need to know of a device."""

    capability: tuple[int, int]
    sm_count: int
    shared_per_block: int  # bytes, what a block may opt in to


@functools.cache
def device_figures(index: int) -> Figures:
    properties = torch.cuda.get_device_properties(index)
    return Figures(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )


def unavailable() -> str | None:
    if extension.module is None:
        return extension.missing
    if not extension.module.has_cuda:
        return (
            "the compiled extension has no CUDA kernels: it was built where torch has no CUDA or "
            "without nvcc"
        )
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def unsupported(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    if device.type != "cuda":
        return f"it takes CUDA tensors, got tensors on {device}"
    index = torch.cuda.current_device() if device.index is None else device.index
    return does_not_fit(device_figures(index), dtype, shape)


def does_not_fit(figures: Figures, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Why a call of ``shape`` (I, J, K, D, R) can't run on a device, or None."""
    I, J, K, D, _ = shape
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in float32 and takes float32, bfloat16 and float16, got {dtype}"
    if figures.capability < (8, 0):
        major, minor = figures.capability
        return f"it needs a device of capability 8.0 (sm_80), this one has {major}.{minor}"
    per_capsule = 1 if D <= 8 else 2 if D <= 16 else 4
    if D > 32 or J * per_capsule > MAX_FRAGMENTS:
        return (
            f"a sample's outputs do not fit in registers: D <= 32 and J <= {MAX_FRAGMENTS} for "
            f"D <= 8, {MAX_FRAGMENTS // 2} for D <= 16, {MAX_FRAGMENTS // 4} for D <= 32 are "
            f"needed, got J = {J}, D = {D}; use backend 'triton'"
        )
    fragments = J * per_capsule
    padded_K = -(-K // 8) * 8
    weight_bytes = fragments * 8 * padded_K * dtype.itemsize  # of one input capsule
    capsules = -(-I // min(I, figures.sm_count))
    sweep = (
        capsules * weight_bytes
        + max(SWEEP_WARPS // 2 * fragments, (SWEEP_WARPS - 1) * per_capsule) * FRAGMENT_BYTES
    )
    gradients = (
        (4 * fragments + 2) * FRAGMENT_BYTES
        + J * 32 * 4
        + weight_bytes
        + -(-fragments // 2) * 2 * 8 * padded_K * 4
    )
    needed = max(sweep, gradients)
    if needed > figures.shared_per_block:
        return (
            f"weight does not fit in shared memory: {capsules} of {I} input capsules a block need "
            f"{needed} bytes, a block has {figures.shared_per_block}; use backend 'triton'"
        )
    return None
