"""What a call's configuration depends on of its device: read without importing Triton."""

from dataclasses import dataclass

import torch

from . import config


@dataclass(frozen=True)
class Gpu:
    """What the configurations depend on of a device."""

    processors: int
    hip: bool
    shared_bytes: int = 64 << 10  # of a program, at most; every GPU has so many


def gpu_of(device: torch.device) -> Gpu:
    """The device's description; the interpreter counts as a small GPU, so that groups are cut."""
    if device.type == "cpu":
        return Gpu(processors=4, hip=False, shared_bytes=227 << 10)
    properties = torch.cuda.get_device_properties(device)
    hip = torch.version.hip is not None
    least = Gpu.shared_bytes if hip else 99 << 10  # of every GPU that these kernels run on
    shared = getattr(properties, "shared_memory_per_block_optin", least)
    return Gpu(properties.multi_processor_count, hip, shared)


def precision_of(dtype: torch.dtype, gpu: Gpu) -> str:
    """How tl.dot multiplies operands of the accumulation dtype.

    float32 tensors obey torch.backends.cuda.matmul.fp32_precision, which older settings, such as
    torch.set_float32_matmul_precision(), set as well (only reading those raises where both have
    been used). True float32 is three TF32 products of split operands on CUDA. bfloat16 and float16
    values are TF32 values exactly. HIP devices have float32 matrix instructions.
    """
    if dtype == torch.float64 or gpu.hip:
        return "ieee"
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "tf32x3"
    return "tf32"


def does_not_fit(gpu: Gpu, dtype: torch.dtype, J: int, D: int, K: int) -> str | None:
    """Why not even the smallest programs of a shape fit into shared memory, or None."""
    there = gpu.shared_bytes
    needed = config.least_bytes(J, K, D, dtype.itemsize, precision_of(dtype, gpu), gpu.hip)
    if needed <= there:
        return None
    return (
        f"J = {J}, K = {K}, D = {D} in {dtype} needs {needed} bytes of shared memory for a step of "
        f"the smallest program, and this device has {there}; use another dtype or "
        "backend='reference'"
    )
