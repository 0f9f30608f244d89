"""Kernels of the backward: sweeps for G^(R-1) ... G^1, then one for all gradients of the inputs."""

# A state grows tile by tile, as Triton builds tuples: mypy takes () for the type of all of it.
# mypy: disable-error-code="assignment, misc"

import triton
import triton.language as tl

from .blocks import as_offset, tiles_of_program
from .sweeps import (
    agreement_with,
    load_state,
    logits_of_priors,
    mean_gradient,
    plus,
    program_of_sweep,
    softmax_parts,
    squash_vjps,
    squashed,
    state_for_every_warp,
    state_over_inputs,
    statistics_tile,
    step_inputs,
    store_state,
    sum_of_states,
    summed_agreement_vectors,
    weighted_sum,
    zero_state,
)
from .table import store_in_table


@triton.jit
def total_gradients(
    grad_v_ptr, s_ptr, partial_ptr, G_before_ptr, size, groups, i_b, i_j, B, J: tl.constexpr,
    D: tl.constexpr, WARPS_J: tl.constexpr, UNROLL_J: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dL/dv^t, which is G^t, and ds^t; without partial sums t is R, where it is given."""
    if partial_ptr is None:
        G = load_state(grad_v_ptr, i_b, i_j, B, J, D, WARPS_J, UNROLL_J, BLOCK_D, ACC)
    else:
        G = sum_of_states(
            partial_ptr, size, groups, i_b, i_j, B, J, D,
            WARPS_J, UNROLL_J, BLOCK_B, BLOCK_D, ACC,
        )  # fmt: skip
        if G_before_ptr is not None:
            before = load_state(G_before_ptr, i_b, i_j, B, J, D, WARPS_J, UNROLL_J, BLOCK_D, ACC)
            G = plus(G, before, UNROLL_J)
    s = load_state(s_ptr, i_b, i_j, B, J, D, WARPS_J, UNROLL_J, BLOCK_D, ACC)
    return G, squash_vjps(s, G, UNROLL_J)


@triton.jit(do_not_specialize=["t", "capsules"])
def routing_backward_kernel(
    u_ptr,  # [B, I, K], or a grid (windows.py)
    weight_ptr,  # [I // WEIGHT_SHARING, J, D, K]
    logits_ptr,  # [I, J] or None
    s_ptr,  # [R, B, J, D]
    grad_v_ptr,  # [B, J, D]
    input_ptr,  # [groups, B, J, D]: partial sums of G^t - G^(t+1); None for t = R
    G_before_ptr,  # [B, J, D]: G^(t+1); None where it is 0
    G_ptr,  # [B, J, D]: G^t, written by group 0; None where it is 0
    ds_ptr,  # [R, B, J, D]: ds^t, written by group 0
    partial_ptr,  # [groups, B, J, D]: partial sums of G^(t-1) - G^t, written
    statistics_ptr,  # [3, B, I]: of the softmax where J takes several tiles, else None
    B,
    I,
    t,  # the iteration, 2 or more
    capsules,  # input capsules of a group
    J: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    WEIGHT_SHARING: tl.constexpr,
    WINDOW: tl.constexpr,
    LEAKY: tl.constexpr,
    SUM_INPUT: tl.constexpr,
    FLAT: tl.constexpr,  # where the tiles of J lie in the grid (blocks.tiles_of_program)
    WARPS_I: tl.constexpr,
    WARPS_J: tl.constexpr,
    UNROLL_J: tl.constexpr,
    STEP_I: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    OFFSET: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial sums of G^(t-1) - G^t over a group of input capsules.

    Grid: (batch tiles, groups, tiles of J). With SUM_INPUT ds^t is first made from the partial
    sums of iteration t + 1, otherwise it is there.
    """
    PAIRED: tl.constexpr = u_ptr.dtype.element_ty.primitive_bitwidth == 16
    TILED: tl.constexpr = statistics_ptr is not None
    b_first, i_group, i_j, size = program_of_sweep(
        B, J, D, WARPS_J, UNROLL_J, BLOCK_B, FLAT, OFFSET
    )
    i_b = b_first + tl.arange(0, BLOCK_B)

    p_s = s_ptr + (t - 1) * size
    p_ds = ds_ptr + (t - 1) * size
    V = summed_agreement_vectors(
        s_ptr, size, t - 1, i_b, i_j, B, J, D, WARPS_J, UNROLL_J, BLOCK_B, BLOCK_D, ACC
    )
    if SUM_INPUT:
        G, ds = total_gradients(
            grad_v_ptr, p_s, input_ptr, G_before_ptr, size, tl.num_programs(1), i_b, i_j, B, J, D,
            WARPS_J, UNROLL_J, BLOCK_B, BLOCK_D, ACC,
        )  # fmt: skip
        if i_group == 0:
            store_state(p_ds, ds, i_b, i_j, B, J, D, WARPS_J, UNROLL_J, BLOCK_D)
            if G_ptr is not None:
                store_state(G_ptr, G, i_b, i_j, B, J, D, WARPS_J, UNROLL_J, BLOCK_D)
    else:
        ds = load_state(p_ds, i_b, i_j, B, J, D, WARPS_J, UNROLL_J, BLOCK_D, ACC)
    V = state_for_every_warp(V, WARPS_I, WARPS_J, UNROLL_J)
    ds = state_for_every_warp(ds, WARPS_I, WARPS_J, UNROLL_J)

    G_step = zero_state(WARPS_I * WARPS_J, UNROLL_J, BLOCK_B, BLOCK_D, ACC)
    first = i_group * capsules
    for index in range(first, min(first + capsules, I), WARPS_I * STEP_I):
        start = as_offset(index, OFFSET)
        u, W = step_inputs(
            u_ptr, weight_ptr, b_first, start, i_j, B, I, WEIGHT_SHARING, J, K, D, WINDOW,
            WARPS_I, WARPS_J, UNROLL_J, STEP_I, BLOCK_B, BLOCK_D, BLOCK_K, ACC,
        )  # fmt: skip
        b = ()
        dc = ()
        for n in tl.static_range(UNROLL_J):
            b_n = logits_of_priors(
                logits_ptr, start, i_j + n * WARPS_J, I, J, WARPS_I, WARPS_J, STEP_I, BLOCK_B, ACC
            )
            b += (b_n + agreement_with(V[n], u, W[n], STEP_I, TILED, ACC, PRECISION),)
            dc += (agreement_with(ds[n], u, W[n], STEP_I, TILED, ACC, PRECISION),)
        offsets, mask, plane = statistics_tile(start, i_b, B, I, WARPS_I, WARPS_J, STEP_I)
        p_statistics = None if statistics_ptr is None else statistics_ptr + offsets
        e, inverse = softmax_parts(b, p_statistics, mask, plane, LEAKY, WARPS_I, WARPS_J, UNROLL_J)
        mean = mean_gradient(e, dc, inverse, p_statistics, mask, plane, WARPS_I, WARPS_J, UNROLL_J)
        G_new = ()
        for n in tl.static_range(UNROLL_J):
            dl = e[n] * inverse * (dc[n] - mean)
            G_new += (G_step[n] + weighted_sum(dl, u, W[n], STEP_I, PAIRED, ACC, PRECISION),)
        G_step = G_new
    p_partial = partial_ptr + as_offset(i_group, OFFSET) * size
    G_step = state_over_inputs(G_step, WARPS_I, WARPS_J, UNROLL_J)
    store_state(p_partial, G_step, i_b, i_j, B, J, D, WARPS_J, UNROLL_J, BLOCK_D)


@triton.jit(do_not_specialize=["t", "groups", "finished_rows"])
def routing_state_kernel(
    grad_v_ptr,  # [B, J, D]
    s_ptr,  # [R, B, J, D]
    input_ptr,  # [groups, B, J, D]: partial sums of G^t - G^(t+1); None for t = R
    G_before_ptr,  # [B, J, D]: G^(t+1); None where it is 0
    G_ptr,  # [B, J, D]: G^t, written; None where it is 0
    ds_ptr,  # [R, B, J, D]: ds^t, written
    table_ptr,  # as in the last sweep: V^(t-1) and ds^t from t on, written; or None
    finished_ptr,  # [finished_rows]: counters of the last sweep, set to 0; or None
    B,
    t,  # the iteration, from 1
    groups,
    iterations,  # R
    finished_rows,
    J: tl.constexpr,
    D: tl.constexpr,
    LEAKY: tl.constexpr,
    UNIFORM: tl.constexpr,  # whether the table's ds^1 bears the uniform coupling of iteration 1
    PAIRED: tl.constexpr,  # the table's order
    FLAT: tl.constexpr,
    WARPS_J: tl.constexpr,  # of the last sweep, whose tiles of J the table is padded to
    UNROLL_J: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """ds^t, and the table of V for the last sweep.

    Grid: (batch tiles, 1, tiles of J), which cover all of the table, in tiles of 8 samples.
    """
    b_first, tile_j = tiles_of_program(tl.cdiv(B, 8) * 8, BLOCK_B, FLAT, OFFSET)
    i_b = b_first + tl.arange(0, BLOCK_B)
    TILE_J: tl.constexpr = WARPS_J * UNROLL_J
    PADDED_J: tl.constexpr = (J + TILE_J - 1) // TILE_J * TILE_J
    i_j = 0 if PADDED_J <= BLOCK_J else tile_j * BLOCK_J  # where it can be, a constant
    size = as_offset(B, OFFSET) * (J * D)
    G, ds = total_gradients(
        grad_v_ptr, s_ptr + (t - 1) * size, input_ptr, G_before_ptr, size, groups,
        i_b, i_j, B, J, D, BLOCK_J, 1, BLOCK_B, BLOCK_D, ACC,
    )  # fmt: skip
    store_state(ds_ptr + (t - 1) * size, ds, i_b, i_j, B, J, D, BLOCK_J, 1, BLOCK_D)
    if G_ptr is not None:
        store_state(G_ptr, G, i_b, i_j, B, J, D, BLOCK_J, 1, BLOCK_D)
    if finished_ptr is not None:
        for block in range(tl.program_id(0), tl.cdiv(finished_rows, 256), tl.num_programs(0)):
            rows = block * 256 + tl.arange(0, 256)
            tl.store(finished_ptr + rows, 0, mask=rows < finished_rows)
    if table_ptr is not None:
        CELL: tl.constexpr = 16 * BLOCK_D
        j = (i_j + tl.arange(0, BLOCK_J)).to(OFFSET)[:, None, None]
        d = tl.arange(0, BLOCK_D)[None, None, :]
        m_table = (j < PADDED_J) & (d < BLOCK_D)
        TABLE: tl.constexpr = 2 * PADDED_J * CELL  # of an iteration and a tile of samples
        iteration = (i_b // 8)[None, :, None] * iterations + (t - 1)
        p_table = table_ptr + iteration * TABLE + j * CELL
        b = (i_b % 8)[None, :, None]
        V = summed_agreement_vectors(
            s_ptr, size, t - 1, i_b, i_j, B, J, D, BLOCK_J, 1, BLOCK_B, BLOCK_D, ACC
        )
        first = ds[0] / (J + LEAKY) if UNIFORM else ds[0]
        store_in_table(p_table, first, V[0], b, d, m_table, PADDED_J * CELL, PAIRED)
        for later in range(t + 1, iterations + 1):
            p_table += TABLE
            p_s = s_ptr + (later - 2) * size
            p_ds = ds_ptr + (later - 1) * size
            s = load_state(p_s, i_b, i_j, B, J, D, BLOCK_J, 1, BLOCK_D, ACC)
            ds = load_state(p_ds, i_b, i_j, B, J, D, BLOCK_J, 1, BLOCK_D, ACC)
            V = plus(V, squashed(s, 1), 1)
            store_in_table(p_table, ds[0], V[0], b, d, m_table, PADDED_J * CELL, PAIRED)
