"""Softmax statistics over J, for shapes whose output capsules take several tiles."""

import triton
import triton.language as tl

from .blocks import (
    agreement,
    agreement_vectors,
    input_capsule,
    prediction_vectors,
    prior_logits,
    state_offsets,
    weight_tile,
    wide,
)


@triton.jit(do_not_specialize=["t"])
def routing_statistics_kernel(
    u_ptr,  # [B, I, K]
    weight_ptr,  # [I // WEIGHT_SHARING, J, D, K]
    logits_ptr,  # [I, J] or None
    s_ptr,  # [R, B, J, D]
    ds_ptr,  # [B, J, D] or None: ds^t
    statistics_ptr,  # [2 or 3, B, I]: maximum, sum and (with ds) mean of dc, written
    B,
    I,
    t,  # the iteration, from 1
    J: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    WEIGHT_SHARING: tl.constexpr,
    LEAKY: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    OFFSET: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """For every (b, i): max_j b_ij, sum_j exp(b_ij - max), and sum_j c_ij dc_ij.

    One pass over the tiles of J; what was summed is rescaled when the maximum grows. Grid: (batch
    tiles, blocks of BLOCK_I input capsules).
    """
    i_b = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(OFFSET)
    i_first = tl.program_id(1) * BLOCK_I
    column = tl.arange(0, BLOCK_I)[None, :]
    size = wide(B, OFFSET) * (J * D)
    # The leaky softmax starts with its own logit, 0.
    maximum = tl.full([BLOCK_B, BLOCK_I], 0.0 if LEAKY else float("-inf"), ACC)
    total = tl.full([BLOCK_B, BLOCK_I], 1.0 if LEAKY else 0.0, ACC)
    weighted = tl.zeros([BLOCK_B, BLOCK_I], ACC)
    for i_j in range(0, J, BLOCK_J):
        offsets, mask = state_offsets(i_b, i_j, B, J, D, BLOCK_J, BLOCK_D)
        if not FIRST:
            V = agreement_vectors(s_ptr, offsets, mask, size, t - 1, ACC)
        if ds_ptr is not None:
            ds = tl.load(ds_ptr + offsets, mask=mask, other=0.0)
        for index in range(min(BLOCK_I, I - i_first)):
            i = wide(i_first + index, OFFSET)
            b = prior_logits(logits_ptr, i, i_j, J, BLOCK_B, BLOCK_J, ACC)
            if (not FIRST) or (ds_ptr is not None):
                u = input_capsule(u_ptr, i_b, i, B, I, K, BLOCK_K, ACC)
                W = weight_tile(
                    weight_ptr, i // WEIGHT_SHARING, i_j, J, K, D, BLOCK_J, BLOCK_D, BLOCK_K, ACC
                )
                u_hat = prediction_vectors(u, W, BLOCK_J, BLOCK_D, ACC, PRECISION)
            if not FIRST:
                b += agreement(u_hat, V)
            here = column == index
            m_old = tl.max(tl.where(here, maximum, float("-inf")), axis=1, keep_dims=True)
            m_new = tl.maximum(m_old, tl.max(b, axis=1, keep_dims=True))
            finite = tl.where(m_new == float("-inf"), 0.0, m_new)  # all logits -inf so far
            e = tl.exp(b - finite)
            rescale = tl.exp(m_old - finite)
            total = tl.where(here, total * rescale + tl.sum(e, axis=1, keep_dims=True), total)
            maximum = tl.where(here, m_new, maximum)
            if ds_ptr is not None:
                dc = agreement(u_hat, ds)
                weighted = tl.where(
                    here, weighted * rescale + tl.sum(e * dc, axis=1, keep_dims=True), weighted
                )
    i = (i_first + column).to(OFFSET)
    p_statistics = statistics_ptr + i_b[:, None] * I + i
    m_statistics = (i_b < B)[:, None] & (i < I)
    plane = wide(B, OFFSET) * I
    tl.store(p_statistics, maximum, mask=m_statistics)
    tl.store(p_statistics + plane, total, mask=m_statistics)
    if ds_ptr is not None:
        tl.store(p_statistics + 2 * plane, weighted / total, mask=m_statistics)
