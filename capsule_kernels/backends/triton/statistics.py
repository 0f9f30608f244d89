"""Softmax statistics over J, for shapes whose output capsules take several tiles."""

# A state grows tile by tile, as Triton builds tuples: mypy takes () for the type of all of it.
# mypy: disable-error-code="assignment, misc"

import triton
import triton.language as tl

from .blocks import as_offset, tiles_of_program
from .sweeps import (
    agreement_with,
    load_state,
    logits_of_step,
    over_warps,
    state_for_every_warp,
    statistics_tile,
    step_inputs,
    summed_agreement_vectors,
)


@triton.jit
def filled(
    value, STEPS: tl.constexpr, WARPS: tl.constexpr, BLOCK_B: tl.constexpr, STEP_I: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """A statistic of every step, STEPS tiles [WARPS, BLOCK_B, STEP_I]."""
    x = ()
    for _ in tl.static_range(STEPS):
        x += (tl.full([WARPS, BLOCK_B, STEP_I], value, ACC),)
    return x


@triton.jit
def of_step(x, step, STEPS: tl.constexpr):
    y = x[0]
    for n in tl.static_range(1, STEPS):
        y = tl.where(step == n, x[n], y)
    return y


@triton.jit
def with_step(x, new, step, STEPS: tl.constexpr):
    """A statistic of every step, a new one for one of them."""
    y = ()
    for n in tl.static_range(STEPS):
        y += (tl.where(step == n, new, x[n]),)
    return y


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
    STEPS: tl.constexpr,
    FLAT: tl.constexpr,  # where the groups lie in the grid (blocks.tiles_of_program)
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
    """For every (b, i): max_j b_ij, sum_j exp(b_ij - max), and sum_j c_ij dc_ij.

    Logits are computed as in the sweep that reads the table, in its tiles and by its functions. So
    the largest has the same rounding in numerator and denominator, and it cancels. Every warp goes
    through its output capsules of all tiles, rescales what it has summed when its maximum grows,
    and meets the others at the end. Grid: (batch tiles, 1, groups of STEPS steps).
    """
    WARPS: tl.constexpr = WARPS_I * WARPS_J
    CAPSULES: tl.constexpr = WARPS_I * STEP_I  # of a step
    b_first, i_group = tiles_of_program(B, BLOCK_B, FLAT, OFFSET)
    i_b = b_first + tl.arange(0, BLOCK_B)
    first = i_group * (STEPS * CAPSULES)
    size = as_offset(B, OFFSET) * (J * D)
    # Not -inf, whose difference from logits of -inf would be NaN.
    DOUBLE: tl.constexpr = ACC.primitive_bitwidth == 64
    LOWEST: tl.constexpr = -1.7976931348623157e308 if DOUBLE else -3.4028234663852886e38
    maximum = filled(LOWEST, STEPS, WARPS, BLOCK_B, STEP_I, ACC)
    total = filled(0.0, STEPS, WARPS, BLOCK_B, STEP_I, ACC)
    weighted = filled(0.0, STEPS, WARPS, BLOCK_B, STEP_I, ACC)
    for i_j in range(0, J, WARPS_J * UNROLL_J):
        V = None
        if not FIRST:
            V = summed_agreement_vectors(
                s_ptr, size, t - 1, i_b, i_j, B, J, D, WARPS_J, UNROLL_J, BLOCK_B, BLOCK_D, ACC
            )
            V = state_for_every_warp(V, WARPS_I, WARPS_J, UNROLL_J)
        if ds_ptr is not None:
            ds = load_state(ds_ptr, i_b, i_j, B, J, D, WARPS_J, UNROLL_J, BLOCK_D, ACC)
            ds = state_for_every_warp(ds, WARPS_I, WARPS_J, UNROLL_J)
        for step in range(min(STEPS, tl.cdiv(I - first, CAPSULES))):
            start = as_offset(first + step * CAPSULES, OFFSET)
            u, W = None, ()
            if (not FIRST) or (ds_ptr is not None):
                u, W = step_inputs(
                    u_ptr, weight_ptr, b_first, start, i_j, B, I, WEIGHT_SHARING, J, K, D, WINDOW,
                    WARPS_I, WARPS_J, UNROLL_J, STEP_I, BLOCK_B, BLOCK_D, BLOCK_K, ACC,
                )  # fmt: skip
            b = logits_of_step(
                logits_ptr, V, u, W, start, i_j, I, J,
                WARPS_I, WARPS_J, UNROLL_J, STEP_I, BLOCK_B, True, ACC, PRECISION,
            )  # fmt: skip
            m_old = of_step(maximum, step, STEPS)
            m_new = m_old
            for n in tl.static_range(UNROLL_J):
                m_new = tl.maximum(m_new, b[n])
            rescale = tl.exp(m_old - m_new)
            total_new = of_step(total, step, STEPS) * rescale
            weighted_new = of_step(weighted, step, STEPS) * rescale
            for n in tl.static_range(UNROLL_J):
                e = tl.exp(b[n] - m_new)
                total_new += e
                if ds_ptr is not None:
                    weighted_new += e * agreement_with(ds[n], u, W[n], STEP_I, True, ACC, PRECISION)
            maximum = with_step(maximum, m_new, step, STEPS)
            total = with_step(total, total_new, step, STEPS)
            weighted = with_step(weighted, weighted_new, step, STEPS)
    for step in tl.static_range(STEPS):
        start = as_offset(first + step * CAPSULES, OFFSET)
        offsets, mask, plane = statistics_tile(start, i_b, B, I, WARPS_I, WARPS_J, STEP_I)
        m_all = over_warps(maximum[step], True, WARPS_I, WARPS_J)
        if LEAKY:  # one more logit, 0
            m_all = tl.maximum(m_all, 0.0)
        rescale = tl.exp(maximum[step] - m_all)
        total_all = over_warps(total[step] * rescale, False, WARPS_I, WARPS_J)
        if LEAKY:
            total_all += tl.exp(-m_all)
        tl.store(statistics_ptr + offsets, m_all, mask=mask)
        tl.store(statistics_ptr + plane + offsets, total_all, mask=mask)
        if ds_ptr is not None:
            mean = over_warps(weighted[step] * rescale, False, WARPS_I, WARPS_J) / total_all
            tl.store(statistics_ptr + 2 * plane + offsets, mean, mask=mask)
