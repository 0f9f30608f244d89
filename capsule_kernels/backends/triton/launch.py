"""The host side: which kernels run in which order, on which workspaces."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...ops import forward_shapes
from . import config
from .forward import routing_forward_kernel, routing_output_kernel
from .statistics import routing_statistics_kernel


@dataclass(frozen=True)
class Gpu:
    """What the configurations depend on of a device."""

    processors: int
    hip: bool


def gpu_of(device: torch.device) -> Gpu:
    """The device's description; the interpreter counts as a small GPU, so that groups are cut."""
    if device.type == "cpu":
        return Gpu(processors=4, hip=False)
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return Gpu(count, torch.version.hip is not None)


def run(
    kernel: Any, grid: tuple[int, ...], num_warps: int, num_stages: int, **arguments: Any
) -> None:
    """Launch a kernel on the current device and stream."""
    kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)


def precision_of(dtype: torch.dtype, gpu: Gpu) -> str:
    """How tl.dot multiplies operands of the accumulation dtype.

    float32 tensors obey torch.get_float32_matmul_precision(): "highest" is true float32, on CUDA
    as three TF32 products of split operands. bfloat16 and float16 values are TF32 values exactly.
    HIP devices have float32 matrix instructions.
    """
    if dtype == torch.float64 or gpu.hip:
        return "ieee"
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "tf32x3"
    return "tf32"


def device_guard(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def routing_forward(
    u: Tensor,
    weight: Tensor,
    logits: Tensor | None,
    bias: Tensor | None,
    num_iterations: int,
    leaky: bool,
    weight_sharing: int,
    return_coupling: bool,
    *,
    launch: Callable[..., None] = run,
    gpu: Gpu | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """v, s and coupling: R sweeps and the output, R + 1 launches where J fits into one tile."""
    v, s, coupling = forward_shapes(
        u, weight, logits, bias, num_iterations, leaky, weight_sharing, return_coupling
    )
    if u.shape[0] == 0:
        return v, s, coupling
    u, weight = u.contiguous(), weight.contiguous()
    logits = None if logits is None else logits.contiguous()
    bias = None if bias is None else bias.contiguous()
    B, I, K = u.shape
    _, J, D, _ = weight.shape
    gpu = gpu or gpu_of(u.device)
    sweep = config.sweep(B, I, J, K, D, gpu.processors)
    grid = (sweep.tiles_B, sweep.groups, sweep.tiles_J)

    partials = s.new_empty(2, sweep.groups, B, J, D)  # of two iterations in turn
    statistics = None if sweep.one_tile else s.new_empty(2, B, I)
    wide = config.needs_int64(u.numel(), weight.numel(), s.numel(), partials[0].numel(), B * I * J)
    types = {
        "ACC": tl.float64 if s.dtype == torch.float64 else tl.float32,
        "OFFSET": tl.int64 if wide else tl.int32,
    }
    inputs = {"u_ptr": u, "weight_ptr": weight, "logits_ptr": logits, "s_ptr": s, "B": B, "I": I}
    constants = {
        "J": J, "K": K, "D": D, "WEIGHT_SHARING": weight_sharing, "LEAKY": leaky,
        "PRECISION": precision_of(u.dtype, gpu), **sweep.tile.constants(), **types,
    }  # fmt: skip
    width = {"num_warps": sweep.num_warps, "num_stages": sweep.num_stages}

    def output(t: int) -> None:
        tile = sweep.tile.constants() | {"BLOCK_B": 1}
        launch(
            routing_output_kernel,
            (B, sweep.tiles_J),
            num_warps=2,
            num_stages=1,
            partial_ptr=partials[t % 2],
            bias_ptr=bias,
            s_ptr=s[t - 1],
            v_ptr=v if t == num_iterations else None,
            B=B,
            groups=sweep.groups,
            J=J,
            D=D,
            **{name: tile[name] for name in ("BLOCK_B", "BLOCK_J", "BLOCK_D")},
            **types,
        )

    with device_guard(u.device):
        for t in range(1, num_iterations + 1):
            first = t == 1
            if statistics is not None and not (first and logits is None):
                launch(
                    routing_statistics_kernel,
                    (sweep.tiles_B, config.ceil_div(I, 16)),
                    **width, **inputs, **constants,
                    ds_ptr=None, statistics_ptr=statistics, t=t, FIRST=first, BLOCK_I=16,
                )  # fmt: skip
            launch(
                routing_forward_kernel,
                grid,
                **width, **inputs, **constants,
                bias_ptr=bias,
                input_ptr=partials[(t - 1) % 2] if sweep.one_tile and not first else None,
                partial_ptr=partials[t % 2],
                statistics_ptr=statistics,
                coupling_ptr=coupling if return_coupling and t == num_iterations else None,
                t=t,
                capsules=sweep.capsules,
                FIRST=first,
                SUM_INPUT=sweep.one_tile,
            )  # fmt: skip
            if not sweep.one_tile or t == num_iterations:
                output(t)
    return v, s, coupling
