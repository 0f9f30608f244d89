"""The last sweep of the backward: the gradients of u, weight and logits, all iterations together.

It contracts W with the states, as the other sweeps do (``sweeps.py``), but transposed: the columns
are samples. With x one of ds^t and V^(t-1), and y what stands before it in du_hat, c^t or dl^t,

    P_ij = W_ij^T x_j        u_hat_ij . x_j = u_i . P_ij
    du_i = sum_j y_ij P_ij   dW_ij^T = sum_b (y_ij u_i) x_j^T

so u_hat and du_hat are not formed. A warp's 16 columns are 8 samples of ds^t and the same 8 of
V^(t-1), and its rows the (i, k) of STEP_I input capsules in the order (k % (K/2), i, k // (K/2)). A
matrix instruction leaves rows g, g + 8, ... with thread g of eight; of four capsules of K = 8 those
are one half of one capsule's k. As the left operand of dW, a matrix instruction wants columns q and
q + 4 where a product has left 2q and 2q + 1: as samples may be added in any order, nothing moves.

The states come from a table that holds them in the order in which threads want them, twice: they
are contracted over d in the first product and over samples in the second.
"""

# A state grows tile by tile, as Triton builds tuples: mypy takes () for the type of all of it.
# mypy: disable-error-code="assignment, misc"

import triton
import triton.language as tl

from .blocks import product, wide
from .sweeps import mean_gradient, softmax_parts
from .windows import capsule_offset, sample_offset


@triton.jit
def table_offsets(which, b, d, PAIRED: tl.constexpr):
    """Where element d of sample b (of 8) lies in a cell of ds (``which`` 0) or V (1) of one j.

    Twice: for contractions over d, then over samples. Innermost are the two arrays and the two
    neighbours that one thread holds, then the threads of a warp. Neighbours are four apart, as a
    matrix instruction wants them of a contraction; PAIRED, they are one apart, as Triton wants them
    of operands that were 16 bits wide.
    """
    q, h = (d % 8 // 2, d % 2) if PAIRED else (d % 4, d // 4 % 2)
    over_d = d // 8 * 128 + b * 16 + q * 4 + which * 2 + h
    over_b = d // 8 * 128 + d % 8 * 16 + b // 2 * 4 + which * 2 + b % 2
    return over_d, over_b


@triton.jit
def cells(p, WARPS_J: tl.constexpr, BLOCK_D: tl.constexpr):
    """Cells of WARPS_J output capsules, [WARPS_J, BLOCK_D // 8, 8, 4, 2, 2].

    The threads of a warp come first, so that each loads 16 bytes beside its neighbour's.
    """
    lane = tl.arange(0, 32)[:, None, None, None]
    w = tl.arange(0, WARPS_J)[None, :, None, None]
    n = tl.arange(0, BLOCK_D // 8)[None, None, :, None]
    x = tl.load(
        p + (w * (16 * BLOCK_D) + n * 128 + lane * 4 + tl.arange(0, 4)[None, None, None, :])
    )
    return tl.reshape(tl.permute(x, (1, 2, 0, 3)), [WARPS_J, BLOCK_D // 8, 8, 4, 2, 2])


@triton.jit
def states_over_d(p, WARPS_J: tl.constexpr, BLOCK_D: tl.constexpr, PAIRED: tl.constexpr):
    """ds and V transposed, [WARPS_J, BLOCK_D, 16]."""
    x = tl.permute(cells(p, WARPS_J, BLOCK_D), (0, 1, 3, 5, 4, 2) if PAIRED else (0, 1, 5, 3, 4, 2))
    return tl.reshape(x, [WARPS_J, BLOCK_D, 16])


@triton.jit
def states_over_b(p, WARPS_J: tl.constexpr, BLOCK_D: tl.constexpr, PAIRED: tl.constexpr):
    """ds and V in the order of samples that operand_columns makes, [WARPS_J, 16, BLOCK_D]."""
    x = tl.permute(cells(p, WARPS_J, BLOCK_D), (0, 4, 3, 5, 1, 2) if PAIRED else (0, 4, 5, 3, 1, 2))
    return tl.reshape(x, [WARPS_J, 16, BLOCK_D])


@triton.jit
def operand_columns(x, PAIRED: tl.constexpr):
    """[WARPS_J, N, 16] with the 8 samples of each array in the order (b % 2, b // 2)."""
    if not PAIRED:
        W: tl.constexpr = x.shape[0]
        N: tl.constexpr = x.shape[1]
        x = tl.permute(tl.reshape(x, [W, N, 2, 4, 2]), (0, 1, 2, 4, 3))
        x = tl.reshape(x, [W, N, 16])
    return x


@triton.jit
def input_rows(STEP_I: tl.constexpr, BLOCK_K: tl.constexpr):
    """The (i, k) of each of a warp's rows, [N] each."""
    n = tl.arange(0, STEP_I * BLOCK_K)
    return n // 2 % STEP_I, n // (2 * STEP_I) + n % 2 * (BLOCK_K // 2)


@triton.jit
def over_rows(x, STEP_I: tl.constexpr, BLOCK_K: tl.constexpr):
    """The sum over k of [WARPS_J, N, 16], [WARPS_J, STEP_I, 2, 8]."""
    x = tl.reshape(x, [x.shape[0], BLOCK_K // 2, STEP_I, 2, 2, 8])
    return tl.sum(tl.sum(x, axis=1), axis=2)


@triton.jit
def for_every_row(y, STEP_I: tl.constexpr, BLOCK_K: tl.constexpr):
    """[WARPS_J, STEP_I, 2, 8] for every k, [WARPS_J, N, 16].

    Axes come back in the order in which over_rows took them away: so a layout is found again.
    """
    W: tl.constexpr = y.shape[0]
    y = tl.expand_dims(tl.expand_dims(y, 2), 1)
    y = tl.broadcast_to(y, [W, BLOCK_K // 2, STEP_I, 2, 2, 8])
    return tl.reshape(y, [W, BLOCK_K * STEP_I, 16])


@triton.jit
def over_capsules(x, STEP_I: tl.constexpr, WEIGHT_SHARING: tl.constexpr):
    """[WARPS_J, N, BLOCK_D] summed over the i that share weights, for every i."""
    if WEIGHT_SHARING > 1:
        W: tl.constexpr = x.shape[0]
        N: tl.constexpr = x.shape[1]
        D: tl.constexpr = x.shape[2]
        y = tl.reshape(x, [W, N // (2 * STEP_I), STEP_I, 2, D])
        y = tl.broadcast_to(tl.sum(y, axis=2, keep_dims=True), y.shape)
        x = tl.reshape(y, [W, N, D])
    return x


@triton.jit
def one_array(x, which: tl.constexpr):
    """[WARPS_J, STEP_I, 2, 8] of ds (0) or V (1) alone, [WARPS_J, STEP_I, 8]."""
    return tl.sum(tl.where(tl.arange(0, 2)[None, None, :, None] == which, x, 0.0), axis=2)


@triton.jit
def both_arrays(c, dl):
    """What stands before ds and before V, [WARPS_J, STEP_I, 8] each, as [WARPS_J, STEP_I, 2, 8]."""
    which = tl.arange(0, 2)[None, None, :, None]
    return tl.where(which == 0, tl.expand_dims(c, 2), tl.expand_dims(dl, 2))


@triton.jit
def input_columns_twice(
    u_ptr, b_start, start, end, B, I, K: tl.constexpr, WINDOW: tl.constexpr, WARPS_J: tl.constexpr,
    STEP_I: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """u of 8 samples, once for each array and warp, [WARPS_J, N, 16]; 0 from ``end`` on.

    Loaded in the order in which the threads hold a product: half of a capsule's k a thread.
    """
    lane = tl.arange(0, 8 * STEP_I)[:, None, None, None]
    pair = tl.arange(0, 2)[None, None, :, None] + tl.zeros([1, WARPS_J, 1, 1], tl.int32)
    part = tl.arange(0, BLOCK_K // 2)[None, None, None, :]
    i = start + lane // 8
    k = lane // 4 % 2 * (BLOCK_K // 2) + part
    b = (b_start + lane % 4 * 2 + pair).to(OFFSET)
    mask = (b < B) & (i < end) & (k < K)
    if WINDOW is None:
        capsule = (b * I + i) * K
    else:
        capsule = sample_offset(b, K, WINDOW) + capsule_offset(i, K, WINDOW)
    u = tl.load(u_ptr + capsule + k, mask=mask, other=0.0).to(ACC)
    u = tl.permute(tl.reshape(u, [2 * STEP_I, 4, WARPS_J, 2, BLOCK_K // 2]), (2, 4, 0, 1, 3))
    u = tl.reshape(u, [WARPS_J, STEP_I * BLOCK_K, 1, 8])
    u = tl.broadcast_to(u, [WARPS_J, STEP_I * BLOCK_K, 2, 8])
    return tl.reshape(u, [WARPS_J, STEP_I * BLOCK_K, 16])


@triton.jit
def weight_rows(
    start, end, row, i_j, J: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    WEIGHT_SHARING: tl.constexpr, WARPS_J: tl.constexpr, STEP_I: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Offsets and mask of W^T of every warp, [WARPS_J, N, BLOCK_D]."""
    i, k = input_rows(STEP_I, BLOCK_K)
    j = i_j + tl.arange(0, WARPS_J)
    d = tl.arange(0, BLOCK_D)[None, None, :]
    if WEIGHT_SHARING == 1:
        rows = start + i
        present = (rows < end) & (k < K)
    else:
        rows = row + 0 * i
        present = k < K
    offsets = (rows * (J * D * K) + k)[None, :, None] + (j * (D * K))[:, None, None] + d * K
    return offsets, present[None, :, None] & (j < J)[:, None, None] & (d < D)


@triton.jit
def prior_logits(
    logits_ptr, start, end, i_j, J: tl.constexpr, WARPS_J: tl.constexpr, STEP_I: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Log priors of every warp, [WARPS_J, STEP_I, 8]; -inf beyond J, so that c = 0 there."""
    j = i_j + tl.arange(0, WARPS_J)[:, None, None]
    prior = tl.where(j < J, 0.0, float("-inf")).to(ACC)
    if logits_ptr is not None:
        i = start + tl.arange(0, STEP_I)[None, :, None]
        prior += tl.load(logits_ptr + i * J + j, mask=(i < end) & (j < J), other=0.0).to(ACC)
    return tl.broadcast_to(prior, [WARPS_J, STEP_I, 8])


@triton.jit(do_not_specialize=["first"])
def routing_gradients_kernel(
    u_ptr,  # [B, I, K], or a grid (windows.py)
    weight_ptr,  # [I // WEIGHT_SHARING, J, D, K]
    logits_ptr,  # [I, J] or None
    table_ptr,  # [R, tiles of 8 samples, 2, J padded to whole tiles, 16 BLOCK_D] (table_offsets)
    statistics_ptr,  # [R, 3, B, I]: of the softmax where J takes several tiles, else None
    grad_u_ptr,  # [B, I, K] or None, written
    du_ptr,  # [B, I, K]: sums over the tiles of J, where there are several; may be grad_u
    grad_weight_ptr,  # [splits, I // WEIGHT_SHARING, J, D, K] or None, written
    grad_logits_ptr,  # [batch splits, I, J] or None, written
    B,
    I,
    first,  # the first iteration whose coupling is not uniform
    iterations,  # R
    table_size,  # elements of one iteration's table
    parts,  # how many programs share the capsules of one row of the weights
    capsules,  # how many of them each takes
    batch_tiles,  # how many tiles of 8 samples each takes
    J: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    WEIGHT_SHARING: tl.constexpr,
    WINDOW: tl.constexpr,
    LEAKY: tl.constexpr,
    UNROLL_T: tl.constexpr,  # above 1: there are so many iterations from FIRST_T on, all at once
    FIRST_T: tl.constexpr,
    UNIFORM: tl.constexpr,  # whether iteration 1, whose coupling is uniform, is differentiated
    FULL: tl.constexpr,  # whether couplings are differentiated
    PAIRED: tl.constexpr,  # the order of the table
    WARPS_I: tl.constexpr,  # 1
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
    """Gradients of STEP_I input capsules, or of the capsules that share a row of the weights.

    Grid: (steps of input capsules, or rows of the weights x parts of their capsules; splits of the
    batch).
    """
    N: tl.constexpr = STEP_I * BLOCK_K
    CELL: tl.constexpr = 16 * BLOCK_D
    TILE_J: tl.constexpr = WARPS_J * UNROLL_J
    PADDED_J: tl.constexpr = (J + TILE_J - 1) // TILE_J * TILE_J
    row = wide(tl.program_id(0) // parts, OFFSET)
    part = tl.program_id(0) % parts
    i_split = tl.program_id(1)
    if WEIGHT_SHARING == 1:
        i_first = row * STEP_I
        i_end = min(i_first + STEP_I, I)
    else:
        i_first = row * WEIGHT_SHARING + part * capsules
        i_end = min(i_first + capsules, (row + 1) * WEIGHT_SHARING)
    b_first = i_split * batch_tiles
    b_end = min(b_first + batch_tiles, tl.cdiv(B, 8))
    plane = wide(B, OFFSET) * I
    r_i, r_k = input_rows(STEP_I, BLOCK_K)
    s_i = tl.arange(0, STEP_I)[None, :, None]
    s_b = tl.arange(0, 8)[None, None, :]

    for i_j in range(0, J, TILE_J):
        W = ()
        dW = ()
        for n in tl.static_range(UNROLL_J):
            offsets, mask = weight_rows(
                i_first, i_end, row, i_j + n * WARPS_J, J, K, D,
                WEIGHT_SHARING, WARPS_J, STEP_I, BLOCK_D, BLOCK_K,
            )  # fmt: skip
            W += (tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(ACC),)
            dW += (tl.zeros([WARPS_J, N, BLOCK_D], ACC),)
        for start in range(i_first, i_end, STEP_I):
            prior = ()
            dprior = ()
            for n in tl.static_range(UNROLL_J):
                prior += (
                    prior_logits(
                        logits_ptr, start, i_end, i_j + n * WARPS_J, J, WARPS_J, STEP_I, ACC
                    ),
                )
                dprior += (tl.zeros([WARPS_J, STEP_I, 8], ACC),)
            for tile in range(b_first, b_end):
                u = input_columns_twice(
                    u_ptr, tile * 8, start, i_end, B, I, K, WINDOW,
                    WARPS_J, STEP_I, BLOCK_K, ACC, OFFSET,
                )  # fmt: skip
                du = tl.zeros([WARPS_J, N, 16], ACC)
                p_over_d = table_ptr + wide(tile, OFFSET) * (2 * PADDED_J * CELL) + i_j * CELL
                p_over_b = p_over_d + PADDED_J * CELL
                if UNIFORM:  # ds^1 of the table bears the coupling; V^0 is 0
                    dW_new = ()
                    for n in tl.static_range(UNROLL_J):
                        x = states_over_d(p_over_d + n * WARPS_J * CELL, WARPS_J, BLOCK_D, PAIRED)
                        du += product(W[n], x, ACC, PRECISION)
                        x = states_over_b(p_over_b + n * WARPS_J * CELL, WARPS_J, BLOCK_D, PAIRED)
                        dW_new += (dW[n] + product(operand_columns(u, PAIRED), x, ACC, PRECISION),)
                    dW = dW_new
                i_b = (tile * 8 + s_b).to(OFFSET)
                for t in tl.range(
                    FIRST_T if UNROLL_T > 1 else first,
                    FIRST_T + UNROLL_T if UNROLL_T > 1 else iterations + 1,
                    loop_unroll_factor=UNROLL_T,
                ):
                    to_iteration = wide(t - 1, OFFSET) * table_size
                    P = ()
                    b = ()
                    dc = ()
                    for n in tl.static_range(UNROLL_J):
                        x_n = states_over_d(
                            p_over_d + to_iteration + n * WARPS_J * CELL, WARPS_J, BLOCK_D, PAIRED
                        )
                        P_n = product(W[n], x_n, ACC, PRECISION)
                        P += (P_n,)
                        uP = over_rows(u * P_n, STEP_I, BLOCK_K)
                        b_n = one_array(uP, 1)
                        # V^0 is 0: what is not finite in W or dl does not count in iteration 1.
                        b_n = b_n if UNIFORM else tl.where(t > 1, b_n, 0.0)
                        if (logits_ptr is not None) or ((n + 1) * WARPS_J > (J - 1) % TILE_J + 1):
                            b_n += prior[n]
                        b += (b_n,)
                        dc += (one_array(uP, 0),)
                    if statistics_ptr is None:
                        p_statistics = None
                    else:
                        p_statistics = statistics_ptr + (t - 1) * 3 * plane + i_b * I + start + s_i
                    m_statistics = (i_b < B) & (start + s_i < i_end)
                    e, inverse = softmax_parts(
                        b, p_statistics, m_statistics, plane, LEAKY, WARPS_I, WARPS_J, UNROLL_J
                    )
                    if FULL or grad_logits_ptr is not None:
                        mean = mean_gradient(
                            e, dc, inverse, p_statistics, m_statistics, plane,
                            WARPS_I, WARPS_J, UNROLL_J,
                        )  # fmt: skip
                    dW_next = ()
                    dprior_new = ()
                    for n in tl.static_range(UNROLL_J):
                        c = e[n] * inverse
                        dl = tl.zeros_like(c)
                        if FULL or grad_logits_ptr is not None:
                            dl = c * (dc[n] - mean)
                        if grad_logits_ptr is None:
                            dprior_new += (dprior[n],)
                        else:
                            dprior_new += (dprior[n] + dl,)
                        dl = dl if UNIFORM else tl.where(t > 1, dl, 0.0)
                        y = both_arrays(c, dl if FULL else tl.zeros_like(c))
                        y = for_every_row(y, STEP_I, BLOCK_K)
                        du += y * P[n]
                        x_n = states_over_b(
                            p_over_b + to_iteration + n * WARPS_J * CELL, WARPS_J, BLOCK_D, PAIRED
                        )
                        dW_next += (
                            dW[n] + product(operand_columns(y * u, PAIRED), x_n, ACC, PRECISION),
                        )
                    dW = dW_next
                    dprior = dprior_new
                if grad_u_ptr is not None:
                    du = tl.sum(tl.sum(tl.reshape(du, [WARPS_J, N, 2, 8]), axis=2), axis=0)
                    u_b = (tile * 8 + tl.arange(0, 8)).to(OFFSET)
                    o_u = u_b[None, :] * (I * K) + ((start + r_i) * K + r_k)[:, None]
                    m_u = (u_b < B)[None, :] & ((start + r_i < i_end) & (r_k < K))[:, None]
                    if J > TILE_J:
                        if i_j > 0:
                            du += tl.load(du_ptr + o_u, mask=m_u, other=0.0)
                        tl.store(du_ptr + o_u, du, mask=m_u)
                    if i_j + TILE_J >= J:
                        tl.store(grad_u_ptr + o_u, du.to(grad_u_ptr.dtype.element_ty), mask=m_u)
            if grad_logits_ptr is not None:
                for n in tl.static_range(UNROLL_J):
                    j = i_j + n * WARPS_J + tl.arange(0, WARPS_J)[:, None]
                    i = start + tl.arange(0, STEP_I)[None, :]
                    tl.store(
                        grad_logits_ptr + (wide(i_split, OFFSET) * I + i) * J + j,
                        tl.sum(dprior[n], axis=2).to(grad_logits_ptr.dtype.element_ty),
                        mask=(i < i_end) & (j < J),
                    )
        if grad_weight_ptr is not None:
            rows = wide(I // WEIGHT_SHARING, OFFSET)
            split = wide(i_split, OFFSET) * parts + part
            p_weight = grad_weight_ptr + split * rows * (J * D * K)
            for n in tl.static_range(UNROLL_J):
                offsets, mask = weight_rows(
                    i_first, i_end, row, i_j + n * WARPS_J, J, K, D,
                    WEIGHT_SHARING, WARPS_J, STEP_I, BLOCK_D, BLOCK_K,
                )  # fmt: skip
                if WEIGHT_SHARING > 1:  # all rows of a k hold the sum; the first is stored
                    mask = mask & (r_i == 0)[None, :, None]
                dW_n = over_capsules(dW[n], STEP_I, WEIGHT_SHARING)
                tl.store(p_weight + offsets, dW_n.to(grad_weight_ptr.dtype.element_ty), mask=mask)
        if J > TILE_J:
            tl.debug_barrier()  # du of this tile of J, before other threads add to it
