"""The host side for shapes whose W_ij does not fit into a tile: the kernels of ``wide.py``."""

from typing import Any

from torch import Tensor

from . import config
from .routing import Routing
from .wide import (
    wide_coupling_kernel,
    wide_input_gradient_kernel,
    wide_state_kernel,
    wide_sum_kernel,
    wide_weight_gradient_kernel,
)


def over_blocks(routing: Routing, kernel: Any, programs: int, **arguments: Any) -> None:
    """Launch a kernel that goes through blocks of d and of k."""
    _, _, _, K, D, _ = routing.sizes
    routing.launch(kernel, (programs,), 4, 2, **vars(config.blocks_of(K, D)), **arguments)


def coupling_of(routing: Routing, **arguments: Any) -> None:
    """c and dl of one iteration."""
    B, I, *_ = routing.sizes
    tiles_B = config.ceil_div(B, config.MATRIX_ROWS)
    over_blocks(routing, wide_coupling_kernel, I * tiles_B, **arguments)


def sum_of_predictions(routing: Routing, **arguments: Any) -> None:
    """sum_i y_ij u_hat_ij."""
    B, _, J, K, D, _ = routing.sizes
    tiles_B = config.ceil_div(B, config.MATRIX_ROWS)
    tiles_D = config.ceil_div(D, config.blocks_of(K, D).BLOCK_D)
    over_blocks(routing, wide_sum_kernel, J * tiles_D * tiles_B, **arguments)


def state(routing: Routing, **arguments: Any) -> None:
    """v and V of s, and ds of G."""
    B, _, J, _, D, _ = routing.sizes
    BLOCK_D = config.power_of_two(D)
    routing.launch(wide_state_kernel, (B * J,), 4, 2, BLOCK_D=BLOCK_D, **arguments)


def forward(routing: Routing, bias: Tensor | None, v: Tensor, coupling: Tensor | None) -> None:
    """Fills v, s and coupling: three launches an iteration."""
    B, I, J, _, D, R = routing.sizes
    s = routing.s
    c = s.new_empty(B, I, J)
    V = s.new_empty(2, B, J, D)
    for t in range(1, R + 1):
        before = V[t % 2] if t > 1 else None
        coupling_of(
            routing, V_ptr=before, ds_ptr=None, c_ptr=c, dl_ptr=None,
            coupling_ptr=coupling if t == R else None,
        )  # fmt: skip
        sum_of_predictions(routing, y_ptr=c, bias_ptr=bias, before_ptr=None, sum_ptr=s[t - 1])
        state(
            routing, s_ptr=s[t - 1], V_before_ptr=before,
            V_ptr=V[(t + 1) % 2] if t < R else None, v_ptr=v if t == R else None,
            G_ptr=None, ds_ptr=None,
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
    """Fills the gradients that are given."""
    B, I, J, K, D, R = routing.sizes
    s = routing.s
    first = 1 if full_gradient else R
    V = s.new_empty(R, B, J, D)  # V^(t-1)
    ds = s.new_empty(R, B, J, D)
    c = s.new_empty(R, B, I, J)
    dl = s.new_empty(R, B, I, J) if full_gradient or grad_logits is not None else None
    G = s.new_empty(2, B, J, D)
    for t in range(1, R):
        state(
            routing, s_ptr=s[t - 1], V_before_ptr=V[t - 1] if t > 1 else None, V_ptr=V[t],
            v_ptr=None, G_ptr=None, ds_ptr=None,
        )  # fmt: skip
    for t in range(R, first - 1, -1):
        state(
            routing, s_ptr=s[t - 1], V_before_ptr=None, V_ptr=None, v_ptr=None,
            G_ptr=grad_v if t == R else G[t % 2], ds_ptr=ds[t - 1],
        )  # fmt: skip
        dl_of_t = None if dl is None else dl[t - 1]
        coupling_of(
            routing, V_ptr=V[t - 1] if t > 1 else None,
            ds_ptr=None if dl is None else ds[t - 1],
            c_ptr=c[t - 1], dl_ptr=dl_of_t, coupling_ptr=None,
        )  # fmt: skip
        if t > first:
            sum_of_predictions(
                routing, y_ptr=dl_of_t, bias_ptr=None,
                before_ptr=G[t % 2] if t < R else None, sum_ptr=G[(t + 1) % 2],
            )  # fmt: skip
    tables = {
        "c_ptr": c, "dl_ptr": dl if full_gradient else None, "V_ptr": V, "ds_ptr": ds,
        "first": first,
    }  # fmt: skip
    blocks = config.blocks_of(K, D)
    tiles_K = config.ceil_div(K, blocks.BLOCK_K)
    if grad_u is not None:
        programs = I * tiles_K * config.ceil_div(B, blocks.BLOCK_B)
        du = routing.capsule_gradients(grad_u)
        over_blocks(routing, wide_input_gradient_kernel, programs, grad_u_ptr=du, **tables)
        routing.sum_windows(du, grad_u)
    if grad_weight is not None:
        rows = I // routing.weight_sharing
        programs = rows * J * config.ceil_div(D, blocks.BLOCK_D) * tiles_K
        over_blocks(
            routing, wide_weight_gradient_kernel, programs,
            grad_weight_ptr=grad_weight, **tables,
        )  # fmt: skip
    if dl is not None:
        routing.sum_rows(dl[first - 1 :].flatten(0, 1), grad_logits)
    routing.sum_rows(ds[first - 1 :].flatten(0, 1), grad_bias)
