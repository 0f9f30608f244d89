"""A call's device, as far as its configuration depends on it: read without importing Triton."""

import torch

from .config import Gpu, least_bytes


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
    needed = least_bytes(J, K, D, dtype.itemsize, precision_of(dtype, gpu), gpu)
    if needed <= gpu.shared_bytes:
        return None
    return (
        f"J = {J}, K = {K}, D = {D} in {dtype} needs {needed} bytes of shared memory for a step of "
        f"the smallest program, and this device has {gpu.shared_bytes}; use another dtype or "
        "backend='reference'"
    )
