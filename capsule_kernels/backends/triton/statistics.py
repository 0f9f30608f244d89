"""Softmax statistics over J, for shapes whose output capsules take several tiles."""

import triton
import triton.language as tl

from .blocks import agreement_vectors, product, state_offsets, wide
from .windows import capsule_offset, sample_offset


@triton.jit
def column_of(BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr):
    """The (j, d) that each column n of a tile of weights holds, [BLOCK_J * BLOCK_D] each.

    The order is (d // 2, j, d % 2). A matrix instruction leaves two neighbouring columns with a
    thread, the next four pairs with the four threads of a row, then come the warps, then the
    thread again. So, with a warp to every four j, a thread holds all d of one j: u_hat . V needs
    no exchange between threads, and no logit is computed twice.
    """
    PAIR: tl.constexpr = 2 if BLOCK_D > 1 else 1
    n = tl.arange(0, BLOCK_J * BLOCK_D)
    j = n // PAIR % BLOCK_J
    d = n // (PAIR * BLOCK_J) * PAIR + n % PAIR
    return j, d


@triton.jit
def columns_to_capsules(x, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_B, BLOCK_J * BLOCK_D] in the order of column_of to [BLOCK_B, BLOCK_J, BLOCK_D]."""
    PAIR: tl.constexpr = 2 if BLOCK_D > 1 else 1
    x = tl.reshape(x, [x.shape[0], BLOCK_D // PAIR, BLOCK_J, PAIR])
    return tl.reshape(tl.permute(x, (0, 2, 1, 3)), [x.shape[0], BLOCK_J, BLOCK_D])


@triton.jit
def input_capsule(
    u_ptr, i_b, i, B, I, K: tl.constexpr, WINDOW: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Input capsule i of the samples i_b, [BLOCK_B, BLOCK_K]."""
    i_k = tl.arange(0, BLOCK_K)
    mask = (i_b < B)[:, None] & (i_k < K)[None, :]
    if WINDOW is None:
        rows = (i_b * I + i)[:, None] * K
    else:
        rows = sample_offset(i_b, K, WINDOW)[:, None] + capsule_offset(i, K, WINDOW)
    return tl.load(u_ptr + rows + i_k[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def weight_tile(
    weight_ptr, row, i_j, J: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """W of one row of the weights and a tile of output capsules, [BLOCK_J * BLOCK_D, BLOCK_K]."""
    j, d = column_of(BLOCK_J, BLOCK_D)
    j = (j + i_j).to(row.dtype)
    i_k = tl.arange(0, BLOCK_K)
    offsets = (j * D + d)[:, None] * K + i_k[None, :]
    mask = ((j < J) & (d < D))[:, None] & (i_k < K)[None, :]
    return tl.load(weight_ptr + row * (J * D * K) + offsets, mask=mask, other=0.0).to(ACC)


@triton.jit
def prediction_vectors(
    u, W, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr
):
    """u_hat = W u, [BLOCK_B, BLOCK_J, BLOCK_D]."""
    u_hat = product(u, tl.trans(W), ACC, PRECISION)
    return columns_to_capsules(u_hat, BLOCK_J, BLOCK_D)


@triton.jit
def prior_logits(
    logits_ptr, i, i_j, J: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Log priors of input capsule i, [BLOCK_B, BLOCK_J]; -inf beyond J, so that c = 0 there."""
    j = i_j + tl.arange(0, BLOCK_J)
    if logits_ptr is None:
        prior = tl.where(j < J, 0.0, float("-inf")).to(ACC)
    else:
        prior = tl.load(logits_ptr + i * J + j, mask=j < J, other=float("-inf")).to(ACC)
    return tl.broadcast_to(prior[None, :], [BLOCK_B, BLOCK_J])


@triton.jit
def agreement(u_hat, x):
    """u_hat . x over d: [BLOCK_B, BLOCK_J, BLOCK_D] twice to [BLOCK_B, BLOCK_J]."""
    return tl.sum(u_hat * x, axis=2)


@triton.jit(do_not_specialize=["t"])
def routing_statistics_kernel(
    u_ptr,  # [B, I, K], or a grid (windows.py)
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
    WINDOW: tl.constexpr,
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
                u = input_capsule(u_ptr, i_b, i, B, I, K, WINDOW, BLOCK_K, ACC)
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
