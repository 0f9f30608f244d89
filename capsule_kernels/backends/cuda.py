"""CUDA C++ kernels (``csrc/cuda``), registered by the compiled extension where it has CUDA.

A warp keeps the predictions of a tile of 8 samples in registers, and the grid keeps W in shared
memory through all iterations: what does not fit is left to Triton.
"""

import functools
from typing import NamedTuple

import torch

from . import extension

SERVES = (
    "CUDA tensors on sm_80 and up, float32, bfloat16 and float16, where a sample's outputs fit in "
    "registers (J <= 20 for D <= 8, 10 for D <= 16, 5 for D <= 32) and weight in shared memory"
)

MEASURED_ON = ((9, 0),)
"""Capabilities of the devices on which a report in bench/results shows these kernels right, and
faster than Triton's, for the calls of ``is_preferred``."""

# As in csrc/cuda/plan.h.
MAX_FRAGMENTS = 10
FRAGMENT_BYTES = 16 * 8 * 4
SWEEP_WARPS = 8
ARRIVALS_BYTES = 8
MOST_ELEMENTS = 2**31 - 1  # of a sample of u, as the kernels count them


class Figures(NamedTuple):
    """What the kernels need to know of a device."""

    capability: tuple[int, int]
    sm_count: int
    shared_per_block: int  # bytes, what a block may opt in to


@functools.cache
def device_figures(index: int) -> Figures:  # needs a GPU
    properties = torch.cuda.get_device_properties(index)
    return Figures(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )


def unavailable() -> str | None:
    if extension.module is None:
        return extension.missing
    if not getattr(extension.module, "cuda_targets", ""):
        return (
            "the compiled extension has no CUDA kernels: it was built where torch has no CUDA or "
            "without nvcc"
        )
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def is_preferred(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether ``backend="auto"`` takes these kernels before Triton's on a CUDA device.

    The routing of the paper's networks for digits, in float32 and bfloat16: what was measured.
    """
    _, J, K, D, _, weight_sharing = shape
    alike = (
        dtype in (torch.float32, torch.bfloat16)
        and (J, K, D) == (10, 8, 16)
        and weight_sharing == 1
    )
    return alike and torch.cuda.get_device_capability(device) in MEASURED_ON


def unsupported(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    if device.type != "cuda":
        return f"it takes CUDA tensors, got tensors on {device}"
    index = torch.cuda.current_device() if device.index is None else device.index
    figures = device_figures(index)
    return no_code_for(figures.capability) or does_not_fit(figures, dtype, shape)


@functools.cache
def no_code_for(capability: tuple[int, int]) -> str | None:
    """Why the extension's kernels can't be loaded on a device, or None.

    Machine code (``sm_``) runs on devices of its generation that are as new, with a letter on that
    very device; the driver compiles virtual code (``compute_``) for all that are as new.
    """
    targets: str = getattr(extension.module, "cuda_targets", "")
    for target in targets.split(","):
        kind, _, number = target.rpartition("_")
        digits = number.rstrip("af")
        major, minor = int(digits[:-1]), int(digits[-1])
        if number.endswith("a"):
            runs = capability == (major, minor)
        else:
            alike = kind == "compute" or capability[0] == major
            runs = alike and capability >= (major, minor)
        if runs:
            return None
    major, minor = capability
    return (
        f"the compiled extension was built for {targets} and this device is sm_{major}{minor}: "
        f"build it anew on this machine, or with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )


def does_not_fit(figures: Figures, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """Why a call of ``shape`` (I, J, K, D, R, weight_sharing) can't run on a device, or None."""
    I, J, K, D, R, weight_sharing = shape
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in float32 and takes float32, bfloat16 and float16, got {dtype}"
    if figures.capability < (8, 0):
        major, minor = figures.capability
        return f"it needs a device of capability 8.0 (sm_80), this one has {major}.{minor}"
    padded_D = 8 if D <= 8 else 16 if D <= 16 else 32
    if D > 32 or J * padded_D > MAX_FRAGMENTS * 16:
        return (
            "a sample's outputs do not fit in registers: D <= 32 and J <= 20 for D <= 8, 10 for "
            f"D <= 16, 5 for D <= 32 are needed, got J = {J}, D = {D}; use backend 'triton'"
        )
    if I * K > MOST_ELEMENTS:
        return (
            f"a sample's inputs have I * K = {I} * {K} = {I * K} elements, which the kernels count "
            f"in 32 bits, at most {MOST_ELEMENTS}; use backend 'triton'"
        )
    # Where J is no constant of an instance, output capsules fill up two fragments together.
    known = K <= 8 and K % 2 == 0 and (J, padded_D) in ((10, 16), (5, 16), (10, 8))
    padded_J = J if known else -(-J * padded_D // 32) * (32 // padded_D)
    fragments = padded_J * padded_D // 16
    elements = fragments * 16 * (-(-K // 8) * 8)  # of the weight of one input capsule
    # A block has `capsules` consecutive ones, which touch at most `rows` weights.
    capsules = -(-I // min(I, figures.sm_count))
    rows = (capsules + weight_sharing - 2) // weight_sharing + 1
    forward = rows * elements * dtype.itemsize + SWEEP_WARPS * fragments * FRAGMENT_BYTES
    # The gradients of one input capsule: the states of all iterations, du_hat, dprior, weight, dW.
    gradients = (
        2 * ARRIVALS_BYTES
        + 2 * R * fragments * FRAGMENT_BYTES
        + padded_J * 32 * 4
        + elements * (dtype.itemsize if known else dtype.itemsize + 4)
    )
    if forward > figures.shared_per_block:
        return (
            f"weight does not fit in shared memory: {rows} weights of {capsules} of {I} input "
            f"capsules a block need {forward} bytes, a block has {figures.shared_per_block}; "
            "use backend 'triton'"
        )
    if gradients > figures.shared_per_block:
        return (
            f"the backward's states of {R} iterations beside one weight do not fit in shared "
            f"memory: they need {gradients} bytes, a block has {figures.shared_per_block}; "
            "use backend 'triton'"
        )
    return None
