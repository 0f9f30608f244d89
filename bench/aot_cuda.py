"""The CUDA C++ kernels (``csrc/cuda``) that a call would launch, compiled by nvcc without a GPU."""

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .aot_loops import SASS, loop_lengths
from .aot_rows import TARGETS, Row
from .aot_triton import examine_cubin, number
from .shapes import Shape

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
"""What ``make cuda-build`` compiles for."""

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
    if precision not in PRECISIONS or target not in ARCHITECTURES:
        return
    policy, scalar, scalar_bytes = PRECISIONS[precision]
    sizes = (B, shape.I, shape.J, shape.K, shape.D, R, scalar_bytes)
    gpu = TARGETS[target].multiprocessors, TARGETS[target].block_bytes
    plan = Plan(*map(int, output_of(Path(planner().name, "planner"), *sizes, *gpu).split()))
    if plan.sweep_shared == 0 or plan.gradient_shared == 0:
        return
    known = f", {plan.known_J}" if plan.known_J else ""
    tile = f"{policy}, {scalar}, TileOf<{plan.padded_D}{known}>"
    # Warps of a block, its shared memory, and the template's arguments; no memory: not launched.
    launched = dict.fromkeys(KERNELS, (plan.sweep_warps, plan.sweep_shared, tile))
    launched[GRADIENTS] = plan.gradient_warps, plan.gradient_shared, tile
    one_product = policy != "SplitTf32"
    launched[OUTPUTS] = shape.J, plan.output_shared * one_product, f"{tile}, {R}"
    one_product &= target == "sm_90"
    shared = plan.warpgroup_shared * one_product, plan.warpgroup_states_shared * one_product
    for kernel, bytes_ in zip(WARPGROUPS, shared, strict=True):
        launched[kernel] = plan.sweep_warps, bytes_, f"{scalar}, {shape.J}"
    launched = {kernel: launch for kernel, launch in launched.items() if launch[1] > 0}
    facts = compiled(tuple((kernel, launch[2]) for kernel, launch in launched.items()), target)
    padded_B = -(-B // 8) * 8
    for kernel, (warps, shared_bytes, _) in launched.items():
        yield Row(
            "cuda", kernel, shape.name, precision, target, warps, shared_bytes=shared_bytes,
            useful=B / padded_B * shape.D / plan.padded_D, **facts[kernel],
        )  # fmt: skip


@functools.cache
def compiled(instances: tuple[tuple[str, str], ...], target: str) -> dict[str, dict[str, Any]]:
    """What rows say of instances, (kernel, template arguments), which are compiled in one go: what
    they include takes its time."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "instances.cu", Path(folder) / "instances.cubin"
        wanted = "".join(
            f"template __global__ void {kernel}<{arguments}>({KERNELS[kernel]});\n"
            for kernel, arguments in instances
        )
        source.write_text(
            f'#include "launch.cuh"\nnamespace capsule_kernels::cuda {{\n{wanted}}}\n'
        )
        processor = "sm_90a" if target == "sm_90" else target  # as setup.py has it
        report = output_of(
            nvcc(), "-std=c++17", "-O3", "-cubin", f"-arch={processor}", "-Xptxas", "-v",
            f"-I{SOURCES}", source, "-o", cubin,
        )  # fmt: skip
        _, listing = examine_cubin(cubin.read_bytes())
    reports = by_function(r"Compiling entry function '(\w+)'", report)
    listings = by_function(r"\.section\s+\.text\.(\w+),", listing)
    facts = {}
    for kernel, _ in instances:
        (name,) = (name for name in reports if f"{len(kernel)}{kernel}I" in name)
        facts[kernel] = {
            "registers": number(r"Used (\d+) registers", reports[name]),
            # Arrays, too, that are indexed by what is no constant.
            "spilled_bytes": number(r"(\d+) bytes stack frame", reports[name]),
            "matrix_instructions": len(re.findall(SASS.matrix, listings[name])),
            "loops": loop_lengths(listings[name]),
        }
    return facts


def by_function(heading: str, text: str) -> dict[str, str]:
    """What stands behind each heading, by the function's name in it."""
    _, *parts = re.split(heading, text)
    return dict(zip(parts[::2], parts[1::2], strict=True))


@functools.cache
def planner() -> tempfile.TemporaryDirectory[str]:
    """Holds ``planner``, which prints the figures of :class:`Plan`, until this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="capsule_kernels_")
    source = Path(folder.name, "planner.cpp")
    source.write_text(PLANNER)
    output_of("c++", "-std=c++17", f"-I{SOURCES}", source, "-o", source.with_suffix(""))
    return folder


def output_of(*command: object) -> str:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{result.stderr}")
    return result.stdout + result.stderr
