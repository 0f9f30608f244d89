"""Kernels of the forward: one sweep over the input capsules an iteration, then the output."""

import triton
import triton.language as tl

from .blocks import (
    agreement,
    agreement_vectors,
    bias_tile,
    coupling_coefficients,
    input_capsule,
    prediction_vectors,
    prior_logits,
    squash,
    state_offsets,
    sum_of_partials,
    weight_tile,
    wide,
)


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
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    OFFSET: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial sums of s^t over a group of input capsules, for a batch tile and a tile of J.

    Grid: (batch tiles, groups, tiles of J). The partial sums of iteration t - 1
    are added first if they are given, and the programs of group 0 store the total s^(t-1).
    """
    i_b = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(OFFSET)
    i_group = tl.program_id(1)
    i_j = tl.program_id(2) * BLOCK_J
    size = wide(B, OFFSET) * (J * D)
    offsets, mask = state_offsets(i_b, i_j, B, J, D, BLOCK_J, BLOCK_D)

    if not FIRST:
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
    for index in range(first, min(first + capsules, I)):
        i = wide(index, OFFSET)
        u = input_capsule(u_ptr, i_b, i, B, I, K, BLOCK_K, ACC)
        W = weight_tile(
            weight_ptr, i // WEIGHT_SHARING, i_j, J, K, D, BLOCK_J, BLOCK_D, BLOCK_K, ACC
        )
        u_hat = prediction_vectors(u, W, BLOCK_J, BLOCK_D, ACC, PRECISION)
        if FIRST and logits_ptr is None:
            # The first coupling without a prior is uniform. Multiplied here, not after the loop:
            # a bare sum would be left to the matrix unit, which rounds towards zero.
            c = tl.full([BLOCK_B, BLOCK_J], 1.0 / (J + LEAKY), ACC)
        else:
            b = prior_logits(logits_ptr, i, i_j, J, BLOCK_B, BLOCK_J, ACC)
            if not FIRST:
                b += agreement(u_hat, V)
            c = coupling_coefficients(b, statistics_ptr, i_b, i, B, I, LEAKY)
        s += c[:, :, None] * u_hat
        if coupling_ptr is not None:
            j = i_j + tl.arange(0, BLOCK_J)
            tl.store(
                coupling_ptr + (i_b * I + i)[:, None] * J + j[None, :],
                c.to(coupling_ptr.dtype.element_ty),
                mask=(i_b < B)[:, None] & (j < J)[None, :],
            )
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
