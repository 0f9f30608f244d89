"""Kernels of the forward: one sweep over the input capsules an iteration, then the output."""

# A state grows tile by tile, as Triton builds tuples: mypy takes () for the type of all of it.
# mypy: disable-error-code="assignment, misc"

import triton
import triton.language as tl

from .blocks import as_offset, tiles_of_program
from .sweeps import (
    add_bias,
    logits_of_step,
    plus,
    program_of_sweep,
    softmax_parts,
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


@triton.jit
def store_coupling(
    coupling_ptr, c, start, i_b, i_j, B, I, J: tl.constexpr,
    WARPS_I: tl.constexpr, WARPS_J: tl.constexpr, STEP_I: tl.constexpr,
):  # fmt: skip
    """c [WARPS, BLOCK_B, STEP_I] to coupling [B, I, J]."""
    w = tl.arange(0, WARPS_I * WARPS_J)[:, None, None]
    i = start + w // WARPS_J * STEP_I + tl.arange(0, STEP_I)[None, None, :]
    j = i_j + w % WARPS_J
    i_b = i_b[None, :, None]
    mask = (i_b < B) & (i < I) & (j < J)
    tl.store(coupling_ptr + (i_b * I + i) * J + j, c.to(coupling_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["input_groups", "t", "capsules"])
def routing_forward_kernel(
    u_ptr,  # [B, I, K], or a grid (windows.py)
    weight_ptr,  # [I // WEIGHT_SHARING, J, D, K]
    logits_ptr,  # [I, J] or None
    bias_ptr,  # [J, D] or None
    s_ptr,  # [R, B, J, D]: s^1 ... s^(t-1); with input_ptr, s^(t-1) is written
    input_ptr,  # [groups, B, J, D] or None: partial sums of s^(t-1)
    partial_ptr,  # [groups, B, J, D]: partial sums of s^t, written
    statistics_ptr,  # [2, B, I]: the softmax's maximum and sum where J takes several tiles
    coupling_ptr,  # [B, I, J] or None: c^t, written
    input_groups,  # how many they are
    B,
    I,
    t,  # the iteration, from 1
    capsules,  # input capsules of a group, whole steps
    J: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    WEIGHT_SHARING: tl.constexpr,
    WINDOW: tl.constexpr,
    LEAKY: tl.constexpr,
    FIRST: tl.constexpr,
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
    """Partial sums of s^t over a group of input capsules, for a batch tile and a tile of J.

    Grid: (batch tiles, groups, tiles of J). The partial sums of iteration t - 1 are added first if
    they are given, and the programs of group 0 store the total s^(t-1).
    """
    PAIRED: tl.constexpr = u_ptr.dtype.element_ty.primitive_bitwidth == 16
    TILED: tl.constexpr = statistics_ptr is not None
    b_first, i_group, i_j, size = program_of_sweep(
        B, J, D, WARPS_J, UNROLL_J, BLOCK_B, FLAT, OFFSET
    )
    i_b = b_first + tl.arange(0, BLOCK_B)

    V = None
    if not FIRST:
        known = t - 1 if input_ptr is None else t - 2
        V = summed_agreement_vectors(
            s_ptr, size, known, i_b, i_j, B, J, D, WARPS_J, UNROLL_J, BLOCK_B, BLOCK_D, ACC
        )
        if input_ptr is not None:
            s_before = sum_of_states(
                input_ptr, size, input_groups, i_b, i_j, B, J, D,
                WARPS_J, UNROLL_J, BLOCK_B, BLOCK_D, ACC,
            )  # fmt: skip
            if bias_ptr is not None:
                s_before = add_bias(
                    s_before, bias_ptr, i_j, J, D, WARPS_J, UNROLL_J, BLOCK_D, ACC, OFFSET
                )
            V = plus(V, squashed(s_before, UNROLL_J), UNROLL_J)
            if i_group == 0:
                p_s = s_ptr + known * size
                store_state(p_s, s_before, i_b, i_j, B, J, D, WARPS_J, UNROLL_J, BLOCK_D)
        V = state_for_every_warp(V, WARPS_I, WARPS_J, UNROLL_J)

    s = zero_state(WARPS_I * WARPS_J, UNROLL_J, BLOCK_B, BLOCK_D, ACC)
    first = i_group * capsules
    for index in range(first, min(first + capsules, I), WARPS_I * STEP_I):
        start = as_offset(index, OFFSET)
        u, W = step_inputs(
            u_ptr, weight_ptr, b_first, start, i_j, B, I, WEIGHT_SHARING, J, K, D, WINDOW,
            WARPS_I, WARPS_J, UNROLL_J, STEP_I, BLOCK_B, BLOCK_D, BLOCK_K, ACC,
        )  # fmt: skip
        c = ()
        if FIRST and logits_ptr is None:  # uniform
            for _ in tl.static_range(UNROLL_J):
                c += (tl.full([WARPS_I * WARPS_J, BLOCK_B, STEP_I], 1.0 / (J + LEAKY), ACC),)
        else:
            b = logits_of_step(
                logits_ptr, V, u, W, start, i_j, I, J,
                WARPS_I, WARPS_J, UNROLL_J, STEP_I, BLOCK_B, TILED, ACC, PRECISION,
            )  # fmt: skip
            offsets, mask, plane = statistics_tile(start, i_b, B, I, WARPS_I, WARPS_J, STEP_I)
            p_statistics = None if statistics_ptr is None else statistics_ptr + offsets
            e, inverse = softmax_parts(
                b, p_statistics, mask, plane, LEAKY, WARPS_I, WARPS_J, UNROLL_J
            )
            for n in tl.static_range(UNROLL_J):
                c += (e[n] * inverse,)
        s_new = ()
        for n in tl.static_range(UNROLL_J):
            if coupling_ptr is not None:
                store_coupling(
                    coupling_ptr, c[n], start, i_b, i_j + n * WARPS_J, B, I, J,
                    WARPS_I, WARPS_J, STEP_I,
                )  # fmt: skip
            s_new += (s[n] + weighted_sum(c[n], u, W[n], STEP_I, PAIRED, ACC, PRECISION),)
        s = s_new
    p_partial = partial_ptr + i_group.to(OFFSET) * size
    s = state_over_inputs(s, WARPS_I, WARPS_J, UNROLL_J)
    store_state(p_partial, s, i_b, i_j, B, J, D, WARPS_J, UNROLL_J, BLOCK_D)


@triton.jit(do_not_specialize=["groups"])
def routing_output_kernel(
    partial_ptr,  # [groups, B, J, D]: partial sums of s^t
    bias_ptr,  # [J, D] or None
    s_ptr,  # [B, J, D]: s^t, written
    v_ptr,  # [B, J, D] or None: v^t, written
    B,
    groups,
    J: tl.constexpr,
    D: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """s^t from its partial sums, and v^t = squash(s^t). Grid: (batch tiles, 1, tiles of J)."""
    b_first, tile_j = tiles_of_program(B, BLOCK_B, FLAT, OFFSET)
    i_b = b_first + tl.arange(0, BLOCK_B)
    i_j = 0 if J <= BLOCK_J else tile_j * BLOCK_J  # where it can be, a constant
    size = as_offset(B, OFFSET) * (J * D)
    s = sum_of_states(
        partial_ptr, size, groups, i_b, i_j, B, J, D, BLOCK_J, 1, BLOCK_B, BLOCK_D, ACC
    )
    if bias_ptr is not None:
        s = add_bias(s, bias_ptr, i_j, J, D, BLOCK_J, 1, BLOCK_D, ACC, OFFSET)
    store_state(s_ptr, s, i_b, i_j, B, J, D, BLOCK_J, 1, BLOCK_D)
    if v_ptr is not None:
        store_state(v_ptr, squashed(s, 1), i_b, i_j, B, J, D, BLOCK_J, 1, BLOCK_D)
