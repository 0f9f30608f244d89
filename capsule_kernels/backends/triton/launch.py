"""The host side: which kernels run in which order, on which workspaces."""

import functools
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops import backward_shapes, forward_shapes
from . import config
from .backward import routing_backward_kernel, routing_state_kernel, row_sum_kernel
from .forward import routing_forward_kernel, routing_output_kernel
from .gradients import routing_gradients_kernel
from .statistics import routing_statistics_kernel

OPTIONS = {"enable_fp_fusion": True}
"""Compiler options of every launch; this one's default differs between versions of Triton."""


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
    if os.environ.get("CAPSULE_KERNELS_AUTOTUNE") == "1":
        tuned(kernel, num_warps)[grid](**arguments, **OPTIONS)
    else:
        kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages, **OPTIONS)


@functools.cache
def tuned(kernel: Any, num_warps: int) -> Any:
    """The kernel with ``triton.autotune`` about it: slow where it meets new sizes.

    Only the depth of the load pipeline is tuned: tiles, warps and groups decide in which order
    sums are taken, and no environment variable changes results.
    """
    return triton.autotune(
        configs=[triton.Config({}, num_warps, num_stages) for num_stages in (1, 2, 3, 4)],
        key=[name for name in kernel.arg_names if not name.endswith("_ptr") and name != "t"],
    )(kernel)


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


@dataclass(frozen=True)
class Routing:
    """One call of an operator: its inputs, how its sweeps are cut, and where they are launched."""

    launch: Callable[..., None]
    gpu: Gpu
    backward: bool
    u: Tensor
    weight: Tensor
    logits: Tensor | None
    s: Tensor
    leaky: bool
    weight_sharing: int

    @classmethod
    def of(
        cls,
        launch: Callable[..., None],
        gpu: Gpu | None,
        backward: bool,
        u: Tensor,
        weight: Tensor,
        logits: Tensor | None,
        *rest: Any,
    ) -> "Routing":
        logits = None if logits is None else logits.contiguous()
        return cls(
            launch, gpu or gpu_of(u.device), backward,
            u.contiguous(), weight.contiguous(), logits, *rest,
        )  # fmt: skip

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """B, I, J, K, D, R."""
        B, I, K = self.u.shape
        _, J, D, _ = self.weight.shape
        return B, I, J, K, D, self.s.shape[0]

    @cached_property
    def sweep(self) -> config.Sweep:
        B, I, J, K, D, _ = self.sizes
        warps = config.warps_of(J, K, D, config.state_columns(self.backward, self.precision))
        return config.sweep(B, I, J, K, warps, self.gpu.processors)

    @cached_property
    def first_sweep(self) -> config.Sweep:
        """The sweep of iteration 1 of the forward."""
        B, I, J, K, D, _ = self.sizes
        if self.logits is not None or config.UNIFORM_ROWS > B:
            return self.sweep
        warps = config.warps_of_uniform(J, K, D)
        return config.sweep(B, I, J, K, warps, self.gpu.processors)

    @property
    def stages(self) -> int:
        """Of a sweep's load pipeline: on CUDA a step's weights are on their way during another.

        gfx942 has 64 KiB of shared memory, which hold one step, and prefetches into registers.
        """
        return 2 if self.gpu.hip else 3

    @cached_property
    def last_sweep(self) -> config.Warps:
        """What programs hold in the last sweep of the backward."""
        _, _, J, K, D, _ = self.sizes
        return config.warps_of_gradients(J, K, D)

    @property
    def table_size(self) -> int:
        B, _, J, *_ = self.sizes
        return config.table_size(B, J, self.last_sweep)

    @cached_property
    def tiles(self) -> config.Tiles:
        B, _, J, K, D, _ = self.sizes
        return config.tiles(B, J, K, D)

    @cached_property
    def types(self) -> dict[str, Any]:
        """The kernels' arithmetic and the width of their offsets."""
        B, I, J, _, _, R = self.sizes
        state = self.s[0].numel()
        wide = config.needs_int64(
            self.u.numel(), self.weight.numel(), B * I * J, 3 * R * B * I,
            max(self.first_sweep.groups, self.sweep.groups) * state, R * self.table_size,
        )  # fmt: skip
        return {
            "ACC": tl.float64 if self.s.dtype == torch.float64 else tl.float32,
            "OFFSET": tl.int64 if wide else tl.int32,
        }

    @property
    def precision(self) -> str:
        return precision_of(self.u.dtype, self.gpu)

    def over_capsules(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        num_warps: int,
        num_stages: int,
        blocks: Any,
        **arguments: Any,
    ) -> None:
        """Launch a kernel that visits the input capsules."""
        B, I, J, K, D, _ = self.sizes
        self.launch(
            kernel, grid, num_warps, num_stages,
            u_ptr=self.u, weight_ptr=self.weight, logits_ptr=self.logits, B=B, I=I, J=J, K=K, D=D,
            WEIGHT_SHARING=self.weight_sharing, LEAKY=self.leaky,
            PRECISION=self.precision,
            **vars(blocks), **self.types, **arguments,
        )  # fmt: skip

    def over_sweep(self, kernel: Any, sweep: config.Sweep, **arguments: Any) -> None:
        """Launch a sweep of the forward or backward."""
        self.over_capsules(
            kernel, (sweep.tiles_B, sweep.groups, sweep.tiles_J),
            sweep.warps.number, self.stages, sweep.warps,
            capsules=sweep.capsules, **arguments,
        )  # fmt: skip

    def over_tiles(self, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        """Launch a kernel that forms u_hat in tiles."""
        self.over_capsules(kernel, grid, self.tiles.num_warps, 2, self.tiles.tile, **arguments)

    def over_state(self, kernel: Any, B: int, J: int, **arguments: Any) -> None:
        """Launch a kernel that visits [B, J, D] only."""
        BLOCK_D = self.last_sweep.BLOCK_D
        BLOCK_J = min(config.power_of_two(J), max(1, config.MAX_TILE // BLOCK_D))
        self.launch(
            kernel, (B, config.ceil_div(J, BLOCK_J)), 2, 1,
            B=self.sizes[0], J=self.sizes[2], D=self.sizes[4],
            BLOCK_B=1, BLOCK_J=BLOCK_J, BLOCK_D=BLOCK_D, **self.types, **arguments,
        )  # fmt: skip

    def tabulate(self, statistics: Tensor, t: int, ds: Tensor | None = None) -> None:
        """The softmax statistics of iteration t."""
        I = self.u.shape[1]
        self.over_tiles(
            routing_statistics_kernel,
            (self.tiles.tiles_B, config.ceil_div(I, config.STATISTICS_CAPSULES)),
            s_ptr=self.s, ds_ptr=ds, statistics_ptr=statistics, t=t, FIRST=t == 1,
            BLOCK_I=config.STATISTICS_CAPSULES,
        )  # fmt: skip


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
    R = num_iterations
    v, s, coupling = forward_shapes(
        u, weight, logits, bias, R, leaky, weight_sharing, return_coupling
    )
    if u.shape[0] == 0:
        return v, s, coupling
    bias = None if bias is None else bias.contiguous()
    routing = Routing.of(launch, gpu, False, u, weight, logits, s, leaky, weight_sharing)
    one_tile = routing.sweep.one_tile
    B, I, J, *_ = routing.sizes
    # Iteration t writes its partial sums to partials[t % 2] and reads those of t - 1.
    groups = max(routing.first_sweep.groups, routing.sweep.groups)
    partials = s.new_empty(2, groups, *s.shape[1:])
    statistics = None if one_tile else s.new_empty(3, B, I)
    with device_guard(u.device):
        for t in range(1, R + 1):
            if statistics is not None and not (t == 1 and logits is None):
                routing.tabulate(statistics, t)
            sweep = routing.first_sweep if t == 1 else routing.sweep
            routing.over_sweep(
                routing_forward_kernel, sweep,
                input_groups=groups, bias_ptr=bias, s_ptr=s,
                input_ptr=partials[(t - 1) % 2] if one_tile and t > 1 else None,
                partial_ptr=partials[t % 2],
                statistics_ptr=statistics,
                coupling_ptr=coupling if return_coupling and t == R else None,
                t=t, FIRST=t == 1,
            )  # fmt: skip
            groups = sweep.groups
            if t == R or not one_tile:
                routing.over_state(
                    routing_output_kernel, B, J, groups=groups,
                    partial_ptr=partials[t % 2], bias_ptr=bias, s_ptr=s[t - 1],
                    v_ptr=v if t == R else None,
                )  # fmt: skip
    return v, s, coupling


def routing_backward(
    grad_v: Tensor,
    u: Tensor,
    weight: Tensor,
    logits: Tensor | None,
    s: Tensor,
    leaky: bool,
    weight_sharing: int,
    full_gradient: bool,
    output_mask: list[bool],
    *,
    launch: Callable[..., None] = run,
    gpu: Gpu | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients asked for: R - 1 sweeps, the state, the gradients; R + 1 launches.

    One more each for sums over parts of the work, and for the bias; J in several tiles takes two
    more an iteration.
    """
    gradients = backward_shapes(
        grad_v, u, weight, logits, s, leaky, weight_sharing, full_gradient, output_mask
    )
    if u.shape[0] == 0 or not any(output_mask):
        return tuple(g.zero_() for g in gradients)  # type: ignore[return-value]
    grad_u, grad_weight, grad_logits, grad_bias = (
        g if wanted else None for g, wanted in zip(gradients, output_mask, strict=True)
    )
    routing = Routing.of(launch, gpu, True, u, weight, logits, s, leaky, weight_sharing)
    sweep, last_sweep = routing.sweep, routing.last_sweep
    B, I, J, *_, R = routing.sizes
    tiles_J = config.ceil_div(J, last_sweep.output_capsules)
    one_tile = sweep.tiles_J == tiles_J == 1
    grad_v = grad_v.contiguous()
    # The iterations that are differentiated, and the earliest whose ds is needed.
    earliest = 1 if full_gradient else R
    ds = torch.empty_like(s)
    uniform = earliest == 1 and logits is None
    table = s.new_empty(R, routing.table_size)
    tiles_B = config.ceil_div(B, last_sweep.BLOCK_B)
    G = s.new_empty(2, *s.shape[1:])
    partials = s.new_empty(2, sweep.groups, *s.shape[1:]) if earliest < R else None
    statistics = None if one_tile else s.new_empty(R, 3, B, I)

    def state(t: int) -> dict[str, Any]:
        """What ds^t and G^t are made from, and where G^t goes."""
        return {
            "s_ptr": s, "grad_v_ptr": grad_v, "ds_ptr": ds, "t": t,
            "input_ptr": None if partials is None or t == R else partials[(t + 1) % 2],
            "G_before_ptr": G[(t + 1) % 2] if t + 1 < R else None,
            "G_ptr": G[t % 2] if 1 < t < R else None,
        }  # fmt: skip

    with device_guard(u.device):
        for t in range(R, earliest - 1, -1):
            last = t == earliest
            if last or statistics is not None:
                routing.over_state(
                    routing_state_kernel,
                    tiles_B * last_sweep.BLOCK_B, tiles_J * last_sweep.output_capsules,
                    groups=sweep.groups, **state(t),
                    table_ptr=table if last else None, iterations=R,
                    table_size=routing.table_size, LEAKY=routing.leaky, UNIFORM=uniform,
                    WARPS_J=last_sweep.WARPS_J, UNROLL_J=last_sweep.UNROLL_J,
                )  # fmt: skip
            if statistics is not None:
                routing.tabulate(statistics[t - 1], t, ds[t - 1])
            if not last:
                assert partials is not None
                routing.over_sweep(
                    routing_backward_kernel, sweep, **state(t),
                    partial_ptr=partials[t % 2],
                    statistics_ptr=None if statistics is None else statistics[t - 1],
                    SUM_INPUT=one_tile,
                )  # fmt: skip
        step = last_sweep.STEP_I
        rows = config.ceil_div(I, step) if weight_sharing == 1 else I // weight_sharing
        split = config.split(rows, weight_sharing, step, tiles_B, routing.gpu.processors)

        def parts_of(gradient: Tensor | None, number: int) -> Tensor | None:
            """Where ``number`` partial sums of a gradient go: the gradient itself if it is one."""
            if gradient is None or number == 1:
                return gradient
            return s.new_empty(number, *gradient.shape)

        weight_parts = parts_of(grad_weight, split.splits * split.parts)
        logits_parts = parts_of(grad_logits, split.splits)
        du = (
            grad_u
            if tiles_J == 1 or u.dtype == s.dtype
            else torch.empty_like(u, dtype=s.dtype)
        )
        if not (grad_u is None and grad_weight is None and grad_logits is None):
            routing.over_capsules(
                routing_gradients_kernel, (rows * split.parts, split.splits),
                last_sweep.number, 1, last_sweep,
                table_ptr=table, statistics_ptr=statistics,
                grad_u_ptr=grad_u, du_ptr=du,
                grad_weight_ptr=weight_parts, grad_logits_ptr=logits_parts,
                first=2 if uniform else earliest, iterations=R, table_size=routing.table_size,
                parts=split.parts, capsules=split.capsules, batch_tiles=split.batch_tiles,
                UNIFORM=uniform, FULL=full_gradient,
            )  # fmt: skip
        sums = [(weight_parts, grad_weight), (logits_parts, grad_logits)]
        sums.append((ds[earliest - 1 :].flatten(0, 1), grad_bias))
        for parts, gradient in sums:
            if gradient is not None and parts is not None and parts is not gradient:
                columns = gradient.numel()
                launch(
                    row_sum_kernel, (config.ceil_div(columns, 64),), 4, 1,
                    x_ptr=parts, sum_ptr=gradient, rows=parts.shape[0], columns=columns,
                    BLOCK_ROWS=config.power_of_two(min(parts.shape[0], 32)), BLOCK_COLUMNS=64,
                    **routing.types,
                )  # fmt: skip
    return gradients
