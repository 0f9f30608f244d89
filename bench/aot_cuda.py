"""The CUDA C++ kernels (``csrc/cuda``) that a call would launch, compiled by nvcc without a GPU."""

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .aot_rows import Row
from .aot_triton import examine_cubin, loops
from .shapes import Shape

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
DEVICES = {
    "sm_80": (108, 163 << 10),
    "sm_90": (132, 227 << 10),
    "sm_100": (148, 227 << 10),
}
"""Multiprocessors, and bytes of shared memory a block may have, of the usual GPU of each target."""

PRECISIONS = {
    "float32": ("SplitTf32", "float", 4),
    "TF32": ("Tf32", "float", 4),
    "bfloat16": ("Tf32", "BFloat16", 2),
    "float16": ("Tf32", "Float16", 2),
}
"""How an instance multiplies, its scalar type and the bytes of that."""

KERNELS = {
    "routing_forward_kernel": "ForwardArguments, ForwardPlan",
    "routing_backward_states_kernel": "BackwardArguments, BackwardPlan",
    "routing_backward_gradients_kernel": "BackwardArguments, BackwardPlan",
    "routing_backward_outputs_kernel": "BackwardArguments, BackwardPlan",
    "warpgroup_forward_kernel": "ForwardArguments, ForwardPlan",
    "warpgroup_backward_states_kernel": "BackwardArguments, BackwardPlan",
}
GRADIENTS, OUTPUTS, *WARPGROUPS = list(KERNELS)[2:]
"""The last sweep, and the same by output capsules, which large batches take; forward and states of
large batches in products of warpgroups, which sm_90 has."""

PLANNER = """
#include <cstdio>
#include <cstdlib>
#include "plan.h"
int main(int, char** a) {
  using namespace capsule_kernels::cuda;
  const auto n = [&](int i) { return std::atoi(a[i]); };
  const Shape shape{n(1), n(2), n(3), n(4), n(5), n(6), 1};
  const bool fits = tile_fits_registers(shape.J, shape.D);
  const Device device{n(8), n(9)};
  const BackwardPlan plan =
      fits ? plan_backward(shape, n(7), device, /*plain=*/false) : BackwardPlan();
  Shape large = shape;
  large.B = 1 << 20;
  const OutputPlan outputs = plan_outputs(large, n(7), device);
  const Device hopper{n(8), n(9), 1};
  const TileChoice tile = choose_tile(shape);
  std::printf("%d %d %d %d %d %d %d %d %d", tile.D, tile.J, kSweepWarps, plan.sweep.shared_bytes,
              plan.gradients.warps, plan.gradients.shared_bytes,
              outputs.blocks > 0 ? outputs.shared_bytes : 0,
              plan_warpgroups(large, hopper, 1).shared_bytes,
              plan_warpgroups(large, hopper, 2).shared_bytes);
}
"""


class Plan(NamedTuple):
    """What ``plan.h`` decides; a shared memory of 0 where the shape does not fit."""

    padded_D: int
    known_J: int
    sweep_warps: int
    sweep_shared: int
    gradient_warps: int
    gradient_shared: int
    output_shared: int
    warpgroup_shared: int
    """Of the forward; then of the backward's states."""
    warpgroup_states_shared: int


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if nvcc() is None:
        return "nvcc was not found; set CUDA_HOME or put it on the PATH"
    if shutil.which("c++") is None:
        return "no C++ compiler was found"
    return None


def rows(shape: Shape, B: int, R: int, precision: str, target: str) -> Iterator[Row]:
    """Every kernel of a forward and backward; nothing where the shape is left to Triton."""
    if precision not in PRECISIONS or target not in DEVICES:
        return
    policy, scalar, scalar_bytes = PRECISIONS[precision]
    sizes = (B, shape.I, shape.J, shape.K, shape.D, R, scalar_bytes, *DEVICES[target])
    plan = Plan(*map(int, output_of(planner(), *sizes).split()))
    if plan.sweep_shared == 0 or plan.gradient_shared == 0:
        return
    known = f", {plan.known_J}" if plan.known_J else ""
    instance = f"{policy}, {scalar}, TileOf<{plan.padded_D}{known}>"
    padded_B = -(-B // 8) * 8
    for kernel, arguments in KERNELS.items():
        warps, shared, parameters = plan.sweep_warps, plan.sweep_shared, instance
        if kernel == GRADIENTS:
            warps, shared = plan.gradient_warps, plan.gradient_shared
        if kernel == OUTPUTS:
            if plan.output_shared == 0 or policy == "SplitTf32":
                continue
            warps, shared, parameters = shape.J, plan.output_shared, f"{instance}, {R}"
        if kernel in WARPGROUPS:
            shared = (plan.warpgroup_shared, plan.warpgroup_states_shared)[WARPGROUPS.index(kernel)]
            if shared == 0 or target != "sm_90" or policy == "SplitTf32":
                continue
            parameters = f"{scalar}, {shape.J}"
        processor = "sm_90a" if kernel in WARPGROUPS else target
        registers, spilled, matrix, loop_text = compiled(kernel, arguments, parameters, processor)
        yield Row(
            "cuda",
            kernel,
            shape.name,
            precision,
            target,
            warps,
            registers=registers,
            spilled_bytes=spilled,
            shared_bytes=shared,
            matrix_instructions=matrix,
            useful=B / padded_B * shape.D / plan.padded_D,
            loops=loop_text,
        )


@functools.cache
def compiled(kernel: str, arguments: str, instance: str, target: str) -> tuple[int, int, int, str]:
    """Registers, bytes on the stack, matrix instructions and loops of an instance."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "instance.cu", Path(folder) / "instance.cubin"
        source.write_text(
            '#include "launch.cuh"\nnamespace capsule_kernels::cuda {\n'
            f"template __global__ void {kernel}<{instance}>({arguments});\n}}\n"
        )
        report = output_of(
            nvcc(), "-std=c++17", "-O3", "-cubin", f"-arch={target}", "-Xptxas", "-v",
            f"-I{SOURCES}", source, "-o", cubin,
        )  # fmt: skip
        _, listing = examine_cubin(cubin.read_bytes())
    # The stack holds what is spilled, and arrays that are indexed by what is no constant.
    stack = re.search(r"(\d+) bytes stack frame", report)
    registers = re.search(r"Used (\d+) registers", report)
    if stack is None or registers is None:
        raise RuntimeError(f"ptxas named no registers of {kernel}:\n{report}")
    matrix = len(re.findall(r"\bHG?MMA\b", listing))
    return int(registers[1]), int(stack[1]), matrix, loops(listing)


@functools.cache
def planner() -> Path:
    """A program that prints the figures of :class:`Plan`."""
    folder = Path(tempfile.mkdtemp(prefix="capsule_kernels_"))
    source, program = folder / "planner.cpp", folder / "planner"
    source.write_text(PLANNER)
    output_of("c++", "-std=c++17", f"-I{SOURCES}", source, "-o", program)
    return program


def output_of(*command: object) -> str:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{result.stderr}")
    return result.stdout + result.stderr
