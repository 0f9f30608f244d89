"""One call of an operator: where it runs, in which precision, and how its sweeps are cut."""

import functools
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import windows
from . import INTERPRETED, config
from .device import does_not_fit, gpu_of, precision_of
from .row_sum import row_sum_kernel
from .statistics import routing_statistics_kernel
from .windows import grid_gradient_kernel

OPTIONS = {"enable_fp_fusion": True}
"""Compiler options of every launch; this one's default differs between versions of Triton."""

ONE_AT_A_TIME = Lock()
"""Held by interpreted and tuned launches, whose state Triton keeps in one place for all threads."""


def run(
    kernel: Any, grid: tuple[int, ...], num_warps: int, num_stages: int, **arguments: Any
) -> None:
    """Launch a kernel on the current device and stream."""
    tunes = os.environ.get("CAPSULE_KERNELS_AUTOTUNE") == "1"
    with ONE_AT_A_TIME if tunes or INTERPRETED else nullcontext():
        if tunes:
            counts = arguments.get("finished_ptr") is not None
            tuned(kernel, num_warps, counts)[grid](**arguments, **OPTIONS)
        else:
            kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages, **OPTIONS)


@functools.cache
def tuned(kernel: Any, num_warps: int, counts: bool) -> Any:
    """The kernel with ``triton.autotune`` about it: slow where it meets new sizes.

    Only the depth of the load pipeline is tuned: tiles, warps and groups decide in which order
    sums are taken, and no environment variable changes results. Every trial repeats the launch.
    Where programs count (``counts``) who of them is the last, they must find 0 each time, or none
    would be.
    """
    # The key holds the dtypes of tensors anyway; others can't be written to Triton's cache.
    left_out = ("t", "ACC", "OFFSET")
    return triton.autotune(
        configs=[triton.Config({}, num_warps, num_stages) for num_stages in (1, 2, 3, 4)],
        key=[
            name for name in kernel.arg_names if not name.endswith("_ptr") and name not in left_out
        ],
        reset_to_zero=["finished_ptr"] if counts else None,
    )(kernel)


def device_guard(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


ALIGNMENT = 16
"""Bytes. For other addresses Triton compiles a kernel anew, which moves and sums in other units."""


def laid_out(x: Tensor) -> Tensor:
    """``x``, or a copy: contiguous, and aligned, so that how it lay changes no bit of a result."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


@dataclass(frozen=True)
class Routing:
    """One call of an operator: its inputs, how its sweeps are cut, and where they are launched."""

    launcher: Callable[..., None]
    gpu: config.Gpu
    backward: bool
    u: Tensor
    weight: Tensor
    logits: Tensor | None
    s: Tensor
    leaky: bool
    weight_sharing: int
    window: Sequence[int] | None

    @classmethod
    def of(
        cls,
        launcher: Callable[..., None],
        gpu: config.Gpu | None,
        backward: bool,
        u: Tensor,
        weight: Tensor,
        logits: Tensor | None,
        *rest: Any,
    ) -> "Routing":
        logits = None if logits is None else laid_out(logits)
        gpu = gpu or gpu_of(u.device)
        reason = does_not_fit(gpu, u.dtype, *weight.shape[1:])
        if reason is not None:
            raise RuntimeError(f"routing_{'backward' if backward else 'forward'}: {reason}")
        return cls(launcher, gpu, backward, laid_out(u), laid_out(weight), logits, *rest)

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """B, I, J, K, D, R."""
        B, I = windows.sizes(self.u, self.window)
        _, J, D, _ = self.weight.shape
        return B, I, J, self.u.shape[-1], D, self.s.shape[0]

    @property
    def wide(self) -> bool:
        """Whether W_ij takes several blocks (``wide.py``)."""
        _, _, _, K, D, _ = self.sizes
        return config.is_wide(K, D)

    @property
    def window_constants(self) -> tuple[int, ...] | None:
        """What kernels know of a window and its grid (``windows.py``)."""
        return (*self.u.shape[1:4], *self.window) if self.window else None

    @cached_property
    def sweep(self) -> config.Sweep:
        """Every sweep of the forward, the first without priors excepted, or of the backward."""
        _, _, J, K, D, _ = self.sizes
        # 16-bit weights are half as much to read, and split float32 has no registers for more.
        shares = not self.backward and self.precision == "tf32" and not self.paired
        fitted = self.fitting_large(uniform=False) if shares else None
        if fitted is None:
            columns = config.state_columns(self.backward, self.precision)
            fitted = self.fitting(config.warps_of(J, K, D, columns))
        assert fitted is not None, "a shape that does not fit was refused"
        return self.cut(*fitted)

    @cached_property
    def first_sweep(self) -> config.Sweep:
        """The sweep of iteration 1 of the forward, whose coupling is uniform without priors."""
        B, _, J, K, D, _ = self.sizes
        if self.logits is not None or config.UNIFORM_ROWS > B:
            return self.sweep
        fitted = self.fitting_large(uniform=True)
        if fitted is None:
            fitted = self.fitting(config.warps_of_uniform(J, K, D), uniform=True)
        return self.sweep if fitted is None else self.cut(*fitted)

    def cut(self, warps: config.Warps, stages: int) -> config.Sweep:
        B, I, J, K, *_ = self.sizes
        return config.sweep(B, I, J, K, warps, stages, self.gpu.processors)

    def fitting(
        self, warps: config.Warps, uniform: bool = False
    ) -> tuple[config.Warps, int] | None:
        """What fits of a sweep's warps, and the stages of its load pipeline.

        A ``uniform`` sweep, a first one without priors, has no state as an operand.
        """
        states = 0 if uniform else config.states_of(self.backward, self.precision)
        return config.fitting(warps, self.u.element_size(), states, self.gpu)

    def fitting_large(self, uniform: bool) -> tuple[config.Warps, int] | None:
        """The same of a sweep of the forward over a large batch; None if not all of it fits."""
        B, _, J, K, D, _ = self.sizes
        warps = config.warps_of_large(B, J, K, D, uniform)
        if warps is None or self.gpu.shared_bytes < config.LARGE_SHARED:
            return None
        fitted = self.fitting(warps, uniform)
        return fitted if fitted is not None and fitted[0] == warps else None

    @cached_property
    def last_sweep(self) -> config.Warps:
        """What programs hold in the last sweep of the backward."""
        _, _, J, K, D, _ = self.sizes
        warps = config.warps_of_gradients(J, K, D)
        fitting = config.fitting_gradients(warps, self.u.element_size(), self.precision, self.gpu)
        assert fitting is not None, "a shape that does not fit was refused"
        return fitting

    @cached_property
    def split(self) -> config.Split:
        """How the last sweep is cut."""
        B, I, *_ = self.sizes
        warps, shared = self.last_sweep, self.weight_sharing
        rows = config.ceil_div(I, warps.STEP_I) if shared == 1 else I // shared
        return config.split(
            rows, shared, warps.STEP_I, config.ceil_div(B, warps.BLOCK_B), self.gpu.processors,
            counts=not self.gpu.hip,
        )  # fmt: skip

    @property
    def paired(self) -> bool:
        """Whether elements have 16 bits: their operands and the last sweep's table are in another
        order (``table.table_offsets``)."""
        return self.u.element_size() == 2

    @property
    def table_size(self) -> int:
        B, _, J, *_ = self.sizes
        return config.table_size(B, J, self.last_sweep)

    @property
    def types(self) -> dict[str, Any]:
        """The kernels' arithmetic and the width of their offsets."""
        B, I, J, K, D, R = self.sizes
        counts = [self.u.numel(), self.weight.numel(), B * I * J, self.s.numel()]
        if self.backward:
            counts.append(B * I * K)  # du of windows
        if self.wide:
            counts.append(R * B * I * J)
        else:
            groups = max(self.first_sweep.groups, self.sweep.groups)
            counts += [3 * R * B * I, groups * B * J * D, R * self.table_size]
            if self.backward:  # parts of dW and dprior
                split = self.split
                counts.append(split.contributors * split.cut_of(len(self.weight)) * J * D * K)
                counts.append(split.pieces * split.cut_of(I) * J)
        return {
            "ACC": tl.float64 if self.s.dtype == torch.float64 else tl.float32,
            "OFFSET": tl.int64 if config.needs_int64(*counts) else tl.int32,
        }

    @property
    def precision(self) -> str:
        return precision_of(self.u.dtype, self.gpu)

    @cached_property
    def common(self) -> dict[str, Any]:
        """Arguments that are the same for every kernel that takes them."""
        B, I, J, K, D, R = self.sizes
        return {
            "u_ptr": self.u, "weight_ptr": self.weight, "logits_ptr": self.logits,
            "B": B, "I": I, "J": J, "K": K, "D": D, "iterations": R,
            "WEIGHT_SHARING": self.weight_sharing, "WINDOW": self.window_constants,
            "LEAKY": self.leaky, "PAIRED": self.paired, "PRECISION": self.precision, **self.types,
        }  # fmt: skip

    def launch(
        self, kernel: Any, grid: tuple[int, ...], num_warps: int, num_stages: int, **arguments: Any
    ) -> None:
        """Launch a kernel with these arguments, and with those of the common ones that it takes."""
        common = {name: x for name, x in self.common.items() if name in kernel.arg_names}
        self.launcher(kernel, grid, num_warps, num_stages, **common, **arguments)

    def over_sweep(self, kernel: Any, sweep: config.Sweep, **arguments: Any) -> None:
        """Launch a sweep of the forward or backward."""
        grid, flat = config.grid(sweep.tiles_B, sweep.groups, sweep.tiles_J)
        self.launch(
            kernel, grid, sweep.warps.number, sweep.stages,
            capsules=sweep.capsules, FLAT=flat, **vars(sweep.warps), **arguments,
        )  # fmt: skip

    def over_state(self, kernel: Any, samples: int, capsules: int, **arguments: Any) -> None:
        """Launch a kernel that visits so many samples and output capsules of [B, J, D] only."""
        BLOCK_D = self.last_sweep.BLOCK_D
        BLOCK_J = min(config.power_of_two(capsules), max(1, config.MAX_TILE // BLOCK_D))
        grid, flat = config.grid(samples, 1, config.ceil_div(capsules, BLOCK_J))
        self.launch(
            kernel, grid, 2, 1,
            FLAT=flat, BLOCK_B=1, BLOCK_J=BLOCK_J, BLOCK_D=BLOCK_D, **arguments,
        )  # fmt: skip

    def tabulate(self, statistics: Tensor, t: int, ds: Tensor | None = None) -> None:
        """The softmax statistics of iteration t, by the warps of the sweep that reads them."""
        if t == 1 and self.logits is None:
            return  # the coupling is uniform
        sweep, steps = self.sweep, config.STATISTICS_STEPS
        groups = config.ceil_div(self.sizes[1], steps * sweep.warps.capsules)
        grid, flat = config.grid(sweep.tiles_B, 1, groups)
        self.launch(
            routing_statistics_kernel, grid, sweep.warps.number, sweep.stages,
            s_ptr=self.s, ds_ptr=ds, statistics_ptr=statistics, t=t, FIRST=t == 1, STEPS=steps,
            FLAT=flat, **vars(sweep.warps),
        )  # fmt: skip

    def sum_rows(self, x: Tensor | None, total: Tensor | None) -> None:
        """total = x summed over its first axis, where both are there."""
        if x is None or total is None:
            return
        columns = total.numel()
        self.launch(
            row_sum_kernel, (config.ceil_div(columns, 64),), 4, 1,
            x_ptr=x, sum_ptr=total, rows=x.shape[0], columns=columns,
            BLOCK_ROWS=config.power_of_two(min(x.shape[0], 32)), BLOCK_COLUMNS=64,
        )  # fmt: skip

    def capsule_gradients(self, grad_u: Tensor | None) -> Tensor | None:
        """Where the gradients of input capsules [B, I, K] go: grad_u, or a workspace for windows.

        Capsules of several windows are one cell of the grid, and programs must not add to it in
        turns that differ from call to call.
        """
        if grad_u is None or not self.window:
            return grad_u
        B, I, _, K, _, _ = self.sizes
        return self.s.new_empty(B, I, K)

    def sum_windows(self, du: Tensor | None, grad_u: Tensor | None) -> None:
        """grad_u of the grid from the workspace, where there is one."""
        if grad_u is None or du is grad_u:
            return
        size = grad_u.numel()
        self.launch(
            grid_gradient_kernel, (config.ceil_div(size, config.GRID_BLOCK),), 4, 1,
            du_ptr=du, grad_u_ptr=grad_u, size=size, BLOCK=config.GRID_BLOCK,
        )  # fmt: skip
