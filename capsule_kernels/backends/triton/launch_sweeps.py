"""The host side of the sweeps: which kernels run in which order, on which workspaces."""

from typing import Any

import torch
import triton
from torch import Tensor

from . import config
from .backward import routing_backward_kernel, routing_state_kernel
from .forward import routing_forward_kernel, routing_output_kernel
from .gradients import routing_gradients_kernel
from .routing import Routing

UNROLLS = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
"""Whether the last sweep may take two iterations at once. They keep W in registers, of which only
plain TF32 has enough, and only with the assembler of older versions: the newer one spills."""


def forward(routing: Routing, bias: Tensor | None, v: Tensor, coupling: Tensor | None) -> None:
    """Fills v, s and coupling: R sweeps and the output, R + 1 launches where J fits into a tile."""
    B, I, J, _, _, R = routing.sizes
    s = routing.s
    one_tile = routing.sweep.one_tile
    # Iteration t writes its partial sums to partials[t % 2] and reads those of t - 1.
    groups = max(routing.first_sweep.groups, routing.sweep.groups)
    partials = s.new_empty(2, groups, *s.shape[1:])
    statistics = None if one_tile else s.new_empty(3, B, I)
    for t in range(1, R + 1):
        if statistics is not None:
            routing.tabulate(statistics, t)
        sweep = routing.first_sweep if t == 1 else routing.sweep
        routing.over_sweep(
            routing_forward_kernel, sweep,
            input_groups=groups, bias_ptr=bias, s_ptr=s,
            input_ptr=partials[(t - 1) % 2] if one_tile and t > 1 else None,
            partial_ptr=partials[t % 2],
            statistics_ptr=statistics,
            coupling_ptr=coupling if t == R else None,
            t=t, FIRST=t == 1,
        )  # fmt: skip
        groups = sweep.groups
        if t == R or not one_tile:
            routing.over_state(
                routing_output_kernel, B, J, groups=groups,
                partial_ptr=partials[t % 2], bias_ptr=bias, s_ptr=s[t - 1],
                v_ptr=v if t == R else None,
            )  # fmt: skip


def backward(
    routing: Routing,
    grad_v: Tensor,
    full_gradient: bool,
    grad_u: Tensor | None,
    grad_weight: Tensor | None,
    grad_logits: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Fills the gradients that are given: R - 1 sweeps, the state, the gradients; R + 1 launches.

    One more each for sums over parts of the work, for the bias, and for windows summed in a grid;
    J in several tiles takes two more an iteration.
    """
    B, I, J, _, _, R = routing.sizes
    s = routing.s
    sweep, last_sweep = routing.sweep, routing.last_sweep
    tiles_J = config.ceil_div(J, last_sweep.output_capsules)
    one_tile = sweep.tiles_J == tiles_J == 1
    earliest = 1 if full_gradient else R  # of the iterations that are differentiated
    ds = torch.empty_like(s)
    uniform = earliest == 1 and routing.logits is None
    table = s.new_empty(R, routing.table_size)
    tiles_B = config.ceil_div(B, last_sweep.BLOCK_B)
    G = s.new_empty(2, *s.shape[1:])
    partials = s.new_empty(2, sweep.groups, *s.shape[1:]) if earliest < R else None
    statistics = None if one_tile else s.new_empty(R, 3, B, I)

    # Parts that programs leave of a row of each gradient; one is the gradient itself.
    split = routing.split
    number_weight = 1 if grad_weight is None else split.contributors
    number_logits = 1 if grad_logits is None else split.pieces
    finished = None
    if split.counted and max(number_weight, number_logits) > 1:
        finished = torch.empty(split.rows - split.whole, dtype=torch.int32, device=s.device)

    def parts_of(gradient: Tensor | None, number: int) -> Tensor | None:
        """Where ``number`` parts of a gradient's rows that are cut go."""
        if gradient is None or number == 1:
            return None
        return s.new_empty(number, split.cut_of(len(gradient)), *gradient.shape[1:])

    def state(t: int) -> dict[str, Any]:
        """What ds^t and G^t are made from, and where G^t goes."""
        return {
            "s_ptr": s, "grad_v_ptr": grad_v, "ds_ptr": ds, "t": t,
            "input_ptr": None if partials is None or t == R else partials[(t + 1) % 2],
            "G_before_ptr": G[(t + 1) % 2] if t + 1 < R else None,
            "G_ptr": G[t % 2] if 1 < t < R else None,
        }  # fmt: skip

    for t in range(R, earliest - 1, -1):
        last = t == earliest
        if last or statistics is not None:
            routing.over_state(
                routing_state_kernel,
                tiles_B * last_sweep.BLOCK_B, tiles_J * last_sweep.output_capsules,
                groups=sweep.groups, **state(t),
                table_ptr=table if last else None,
                finished_ptr=finished if last else None,
                finished_rows=0 if finished is None else len(finished),
                UNIFORM=uniform, WARPS_J=last_sweep.WARPS_J, UNROLL_J=last_sweep.UNROLL_J,
            )  # fmt: skip
        if statistics is not None and (tiles_J > 1 or not last):
            routing.tabulate(statistics[t - 1], t, ds[t - 1])
        if not last:
            assert partials is not None
            routing.over_sweep(
                routing_backward_kernel, sweep, **state(t),
                partial_ptr=partials[t % 2],
                statistics_ptr=None if statistics is None else statistics[t - 1],
                SUM_INPUT=one_tile,
            )  # fmt: skip
    partials = None  # the parts below take its memory
    weight_parts = parts_of(grad_weight, number_weight)
    logits_parts = parts_of(grad_logits, number_logits)
    grad_capsules = routing.capsule_gradients(grad_u)
    du = grad_capsules
    if du is not None and tiles_J > 1 and du.dtype != s.dtype:
        du = torch.empty_like(du, dtype=s.dtype)
    first = 2 if uniform else earliest
    unrolled = UNROLLS and R - first == 1 and routing.precision == "tf32"
    if not (grad_u is None and grad_weight is None and grad_logits is None):
        routing.launch(
            routing_gradients_kernel, (split.programs,), last_sweep.number, 1,
            table_ptr=table, statistics_ptr=statistics if tiles_J > 1 else None,
            grad_u_ptr=grad_capsules, du_ptr=du,
            grad_weight_ptr=grad_weight, grad_logits_ptr=grad_logits,
            weight_parts_ptr=weight_parts, logits_parts_ptr=logits_parts,
            finished_ptr=finished,
            first=first, **split.share, **vars(last_sweep),
            UNROLL_T=2 if unrolled else 1, FIRST_T=first if unrolled else 0,
            UNIFORM=uniform, FULL=full_gradient,
        )  # fmt: skip
    routing.sum_windows(grad_capsules, grad_u)
    routing.sum_rows(ds[earliest - 1 :].flatten(0, 1), grad_bias)
    if finished is None:
        routing.sum_rows(weight_parts, grad_weight)
        routing.sum_rows(logits_parts, grad_logits)
