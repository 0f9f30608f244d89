"""Kernels of the forward: one sweep over the input capsules an iteration, then the output."""

import triton
import triton.language as tl

from .blocks import (
    agreement_vectors,
    bias_tile,
    coupling_coefficients,
    squash,
    state_offsets,
    sum_of_partials,
    visit,
    wide,
)


@triton.jit
def store_coupling(
    coupling_ptr, c, i_b, i, i_j, B, I, J: tl.constexpr, BLOCK_J: tl.constexpr
):  # fmt: skip
    """c of input capsule i to coupling [B, I, J]."""
    j = i_j + tl.arange(0, BLOCK_J)
    p_coupling = coupling_ptr + (i_b * I + i)[:, None] * J + j[None, :]
    mask = (i_b < B)[:, None] & (j < J)[None, :]
    tl.store(p_coupling, c.to(coupling_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["t"])
def routing_forward_kernel(
    u_ptr,  # [B, I, K]
    weight_ptr,  # [I // WEIGHT_SHARING, J, D, K]
    logits_ptr,  # [I, J] or None
    bias_ptr,  # [J, D] or None
    s_ptr,  # [R, B, J, D]: s^1 ... s^(t-1); with input_ptr, s^(t-1) is written
    input_ptr,  # [groups, B, J, D] or None: partial sums of s^(t-1)
    partial_ptr,  # [groups, B, J, D]: partial sums of s^t, written
    statistics_ptr,  # [2, B, I]: the softmax's maximum and sum where J takes several tiles
    coupling_ptr,  # [B, I, J] or None: c^t, written
    B,
    I,
    t,  # the iteration, from 1
    capsules,  # input capsules of a group
    J: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    WEIGHT_SHARING: tl.constexpr,
    LEAKY: tl.constexpr,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,  # input capsules at a time, 1 or 2
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
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
    i_b = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(OFFSET)
    i_group = tl.program_id(1)
    i_j = tl.program_id(2) * BLOCK_J
    size = wide(B, OFFSET) * (J * D)
    offsets, mask = state_offsets(i_b, i_j, B, J, D, BLOCK_J, BLOCK_D)

    if FIRST:
        V = None
    else:
        if input_ptr is not None:
            V = agreement_vectors(s_ptr, offsets, mask, size, t - 2, ACC)
            s_before = sum_of_partials(input_ptr, offsets, mask, size, tl.num_programs(1), ACC)
            if bias_ptr is not None:
                s_before += bias_tile(bias_ptr, i_j, J, D, BLOCK_J, BLOCK_D, ACC)
            V += squash(s_before)
            if i_group == 0:
                tl.store(s_ptr + (t - 2) * size + offsets, s_before, mask=mask)
        else:
            V = agreement_vectors(s_ptr, offsets, mask, size, t - 1, ACC)

    s = tl.zeros([BLOCK_B, BLOCK_J, BLOCK_D], ACC)
    first = i_group * capsules
    for index in range(first, min(first + capsules, I), STEP):
        i, u_hat, b = visit(
            u_ptr, weight_ptr, logits_ptr, V, index, i_b, i_j, B, I, WEIGHT_SHARING, J, K, D,
            BLOCK_B, BLOCK_J, BLOCK_D, BLOCK_K, ACC, PRECISION,
        )  # fmt: skip
        if STEP == 2:  # beyond I the last capsule again, and nothing is added
            next_i, next_u_hat, next_b = visit(
                u_ptr, weight_ptr, logits_ptr, V, min(index + 1, I - 1), i_b, i_j, B, I,
                WEIGHT_SHARING, J, K, D, BLOCK_B, BLOCK_J, BLOCK_D, BLOCK_K, ACC, PRECISION,
            )  # fmt: skip
            b = tl.join(b, next_b)
        if V is None and logits_ptr is None:
            # The first coupling without a prior is uniform. Multiplied here, not after the loop:
            # a bare sum would be left to the matrix unit, which rounds towards zero.
            c = tl.full(b.shape, 1.0 / (J + LEAKY), ACC)
        else:
            c = coupling_coefficients(b, statistics_ptr, i_b, i, B, I, LEAKY)
        if STEP == 2:
            c, next_c = tl.split(c)
            if coupling_ptr is not None:
                store_coupling(coupling_ptr, next_c, i_b, next_i, i_j, B, I, J, BLOCK_J)
            next_c = tl.where(index + 1 < I, next_c, 0.0)
            s += next_c[:, :, None] * next_u_hat
        if coupling_ptr is not None:
            store_coupling(coupling_ptr, c, i_b, i, i_j, B, I, J, BLOCK_J)
        s += c[:, :, None] * u_hat
    tl.store(partial_ptr + i_group.to(OFFSET) * size + offsets, s, mask=mask)


@triton.jit
def routing_output_kernel(
    partial_ptr,  # [groups, B, J, D]: partial sums of s^t
    bias_ptr,  # [J, D] or None
    s_ptr,  # [B, J, D]: s^t, written
    v_ptr,  # [B, J, D] or None: v^t, written
    B,
    groups,
    J: tl.constexpr,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """s^t from its partial sums, and v^t = squash(s^t). Grid: (batch tiles, tiles of J)."""
    i_b = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(OFFSET)
    i_j = tl.program_id(1) * BLOCK_J
    offsets, mask = state_offsets(i_b, i_j, B, J, D, BLOCK_J, BLOCK_D)
    s = sum_of_partials(partial_ptr, offsets, mask, wide(B, OFFSET) * (J * D), groups, ACC)
    if bias_ptr is not None:
        s += bias_tile(bias_ptr, i_j, J, D, BLOCK_J, BLOCK_D, ACC)
    tl.store(s_ptr + offsets, s, mask=mask)
    if v_ptr is not None:
        tl.store(v_ptr + offsets, squash(s).to(v_ptr.dtype.element_ty), mask=mask)
