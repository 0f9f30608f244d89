"""Compiles the Triton kernels that a call would launch, without a GPU.

The backend's own host code runs on meta tensors, with a launcher that compiles instead. So what is
examined here is what a GPU would be given: the same kernels, tiles, warps and constants.
"""

import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .aot_accesses import loop_accesses
from .aot_loops import PTX, loop_lengths
from .aot_rows import TARGETS, Row
from .shapes import Shape

PRECISIONS = {
    "float32": (torch.float32, "highest"),
    "TF32": (torch.float32, "high"),
    "bfloat16": (torch.bfloat16, "highest"),
    "float16": (torch.float16, "highest"),
    "float64": (torch.float64, "highest"),
}
"""What may be compiled: the dtype of the tensors, and torch's float32 matmul precision."""

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
}


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed; `pip install triton` installs it"
    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET=1 is set, so Triton would interpret; unset it to compile"
    return None


def rows(
    shape: Shape,
    B: int,
    R: int,
    precision: str,
    target: str,
    grid: tuple[int, int, int] | None = None,
    window: tuple[int, int, int, int] | None = None,
) -> Iterator[Row]:
    """Every kernel of a forward and backward with the default options.

    With a ``window`` B grids (H, W, C), and I = C kh kw (``capsule_kernels.ops.FORWARD_SCHEMA``).
    """
    from capsule_kernels.backends.triton import launch
    from capsule_kernels.backends.triton.config import Gpu

    limits = TARGETS[target]
    gpu = Gpu(limits.multiprocessors, target.startswith("gfx"), limits.block_bytes)
    dtype, matmul_precision = PRECISIONS[precision]
    compiled: dict[tuple[str, int, int], Row] = {}

    def record(
        kernel: Any, grid: tuple[int, ...], num_warps: int, num_stages: int, **arguments: Any
    ) -> None:
        source = specialised(kernel, arguments)
        key = source.hash(), num_warps, num_stages
        if key not in compiled:
            compiled[key] = Row(
                "triton", source.name, shape.name, precision, target, num_warps,
                useful=useful(shape, arguments),
                **compile_for(target, source, num_warps, num_stages),
            )  # fmt: skip

    u = torch.empty(B, *(grid or (shape.I,)), shape.K, dtype=dtype, device="meta")
    weight = torch.empty(shape.I, shape.J, shape.D, shape.K, dtype=dtype, device="meta")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul_precision)
    try:
        v, s, _ = launch.routing_forward(
            u, weight, None, None, R, False, 1, False, window, launch=record, gpu=gpu
        )
        launch.routing_backward(
            v, u, weight, None, s, False, 1, True, [True, True, False, False], window,
            launch=record, gpu=gpu,
        )  # fmt: skip
    finally:
        torch.set_float32_matmul_precision(before)
    yield from compiled.values()


def useful(shape: Shape, arguments: dict[str, Any]) -> float:
    """The share of a kernel's tiles, samples times columns (j, d), that is not padding."""
    if "UNROLL_J" in arguments:
        BLOCK_J = arguments["WARPS_J"] * arguments["UNROLL_J"]
    elif "BLOCK_J" in arguments:
        BLOCK_J = arguments["BLOCK_J"]
    else:
        return 1.0
    B, BLOCK_B, BLOCK_D = (arguments[name] for name in ("B", "BLOCK_B", "BLOCK_D"))
    blocks = ((B, BLOCK_B), (shape.J, BLOCK_J), (shape.D, BLOCK_D))
    return math.prod(size / (-(-size // block) * block) for size, block in blocks)


def specialised(kernel: Any, arguments: dict[str, Any]) -> Any:
    """Triton's ``ASTSource`` of a kernel, as its launcher derives it from arguments."""
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list] = {}
    for position, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]  # torch's allocator aligns so
        elif parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def compile_for(target: str, source: Any, warps: int, stages: int) -> dict[str, Any]:
    """What a row says of one kernel, as compiled."""
    import triton
    from triton.backends.compiler import GPUTarget

    from capsule_kernels.backends.triton.routing import OPTIONS

    nvidia = target.startswith("sm_")
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64),
        options={"num_warps": warps, "num_stages": stages, **OPTIONS},
    )
    if not nvidia:
        code = compiled.asm["amdgcn"]
        return {
            "registers": number(r"\.vgpr_count:\s*(\d+)", code),  # counts the AGPRs too
            "spilled_bytes": number(r"\.private_segment_fixed_size:\s*(\d+)", code),
            "shared_bytes": compiled.metadata.shared,
            "matrix_instructions": len(re.findall(r"\bv_mfma_", code)),
        }
    usage, listing = examine_cubin(compiled.asm["cubin"])
    local = r"\b(?:STL|LDL)\b"
    return {
        "registers": number(r"REG:(\d+)", usage),
        # A stack frame that nothing is stored to or loaded from holds no spill.
        "spilled_bytes": number(r"STACK:(\d+)", usage) if re.search(local, listing) else 0,
        "shared_bytes": compiled.metadata.shared + number(r"SHARED:(\d+)", usage),
        "matrix_instructions": len(re.findall(PTX.matrix, compiled.asm["ptx"])),
        "loops": loop_lengths(listing),
        **loop_accesses(compiled.asm["ptx"], warps),
    }


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"this compiler is not known: its output has no {pattern!r}")
    return int(found[1])


def examine_cubin(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code, by the tools that Triton brings along."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def output(*command: str) -> str:
            return subprocess.run(
                [str(tools / command[0]), *command[1:], file.name],
                capture_output=True, text=True, check=True,
            ).stdout  # fmt: skip

        return output("cuobjdump", "-res-usage"), output("nvdisasm", "-c")
