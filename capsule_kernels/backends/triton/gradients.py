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
"""

# A state grows tile by tile, as Triton builds tuples: mypy takes () for the type of all of it.
# mypy: disable-error-code="assignment, misc"

import triton
import triton.language as tl

from .blocks import as_offset, product
from .parts import add_parts, last_of, part_of_gradient, row_of_share, share_of_program, store_share
from .sweeps import lanes_apart, lanes_together, mean_gradient, softmax_parts
from .table import states_over_b, states_over_d
from .windows import capsule_offset, sample_offset


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
def arrays_apart(x):
    """[WARPS_J, STEP_I, 2, 8] as what belongs to ds and what to V, [WARPS_J, STEP_I, 8] each.

    tl.split costs nothing where a thread holds one of the capsules, and else moves them.
    """
    if x.shape[1] == 4:
        first, second = tl.split(tl.permute(x, (0, 1, 3, 2)))
    else:
        which = tl.arange(0, 2)[None, None, :, None]
        first = tl.sum(tl.where(which == 0, x, 0.0), axis=2)
        second = tl.sum(tl.where(which == 1, x, 0.0), axis=2)
    return first, second


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

    Loaded in the order in which the threads hold a product: half of a capsule's k a thread, two
    quarters of two samples. The threads of all warps make one axis (``table.cells``).
    """
    QUARTER: tl.constexpr = BLOCK_K // 4
    x = tl.arange(0, WARPS_J * 8 * STEP_I * QUARTER)[None, :]
    lane = x // QUARTER % (8 * STEP_I)
    rest = tl.arange(0, 4)[:, None]
    i = start + lane // 8
    k = lane // 4 % 2 * (2 * QUARTER) + rest // 2 * QUARTER + x % QUARTER
    b = (b_start + lane % 4 * 2 + rest % 2).to(OFFSET)
    mask = (b < B) & (i < end) & (k < K)
    if WINDOW is None:  # as one product, which takes a register less
        capsule = (b * I + i) * K
    else:
        capsule = sample_offset(b, I, K, WINDOW) + capsule_offset(i, K, WINDOW)
    u = tl.load(u_ptr + capsule + k, mask=mask, other=0.0).to(ACC)
    u = tl.reshape(u, [2, 2, WARPS_J, 2 * STEP_I, 4, QUARTER])
    u = tl.permute(u, (2, 0, 5, 3, 4, 1))
    u = tl.reshape(u, [WARPS_J, STEP_I * BLOCK_K, 1, 8])
    u = tl.broadcast_to(u, [WARPS_J, STEP_I * BLOCK_K, 2, 8])
    return tl.reshape(u, [WARPS_J, STEP_I * BLOCK_K, 16])


@triton.jit
def weight_cells(
    capsules, i_j, J: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    WEIGHT_SHARING: tl.constexpr, WARPS_J: tl.constexpr, STEP_I: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Offsets of W of every warp, [STEP_I, WARPS_J, BLOCK_D, BLOCK_K], from a program's first row
    on, and their mask: there are so many capsules."""
    i = tl.arange(0, STEP_I)[:, None, None, None]
    j = (i_j + tl.arange(0, WARPS_J)[None, :, None, None]).to(OFFSET)
    d = tl.arange(0, BLOCK_D)[None, None, :, None]
    k = tl.arange(0, BLOCK_K)[None, None, None, :]
    if WEIGHT_SHARING > 1:
        i = 0 * i
    mask = (i < capsules) & (j < J) & (d < D) & (k < K)
    return ((i.to(OFFSET) * J + j) * D + d) * K + k, mask


@triton.jit
def load_weights(
    weight_ptr, capsules, i_j, J: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    WEIGHT_SHARING: tl.constexpr, WARPS_J: tl.constexpr, STEP_I: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """W^T of every warp, [WARPS_J, N, BLOCK_D], of so many capsules.

    Loaded along k, by neighbouring threads along i: with that order of axes Triton keeps it with N
    innermost, where the threads of a matrix instruction find it in different banks.
    """
    offsets, mask = weight_cells(
        capsules, i_j, J, K, D, WEIGHT_SHARING, WARPS_J, STEP_I, BLOCK_D, BLOCK_K, OFFSET
    )
    W = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(ACC)
    W = tl.reshape(W, [STEP_I, WARPS_J, BLOCK_D, 2, BLOCK_K // 2])
    return tl.reshape(tl.permute(W, (1, 4, 0, 3, 2)), [WARPS_J, STEP_I * BLOCK_K, BLOCK_D])


@triton.jit
def weight_rows(
    capsules, i_j, J: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    WEIGHT_SHARING: tl.constexpr, WARPS_J: tl.constexpr, STEP_I: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Offsets of W^T of every warp, [WARPS_J, N, BLOCK_D], from a program's first row on, and their
    mask: there are so many capsules."""
    i, k = input_rows(STEP_I, BLOCK_K)
    j = (i_j + tl.arange(0, WARPS_J)).to(OFFSET)
    d = tl.arange(0, BLOCK_D)[None, None, :]
    if WEIGHT_SHARING > 1:
        i = 0 * i
    offsets = (i.to(OFFSET) * (J * D * K) + k)[None, :, None] + (j * (D * K))[:, None, None] + d * K
    present = ((i < capsules) & (k < K))[None, :, None]
    return offsets, present & (j < J)[:, None, None] & (d < D)


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


@triton.jit
def store_weight_gradients(
    weight_ptr, p_part, cut, dW, first, capsules, i_j,
    J: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    WEIGHT_SHARING: tl.constexpr, WARPS_J: tl.constexpr, UNROLL_J: tl.constexpr,
    STEP_I: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """dW of a tile of J, UNROLL_J tiles [WARPS_J, N, BLOCK_D]; ``first``: where the row starts."""
    r_i, _ = input_rows(STEP_I, BLOCK_K)
    for n in tl.static_range(UNROLL_J):
        offsets, mask = weight_rows(
            capsules, i_j + n * WARPS_J, J, K, D,
            WEIGHT_SHARING, WARPS_J, STEP_I, BLOCK_D, BLOCK_K, OFFSET,
        )  # fmt: skip
        if WEIGHT_SHARING > 1:  # all rows of a k hold the sum; the first is stored
            mask = mask & (r_i == 0)[None, :, None]
        dW_n = over_capsules(dW[n], STEP_I, WEIGHT_SHARING)
        store_share(weight_ptr, p_part, cut, first, offsets, dW_n, mask)


@triton.jit
def store_prior_gradients(
    logits_ptr, p_part, cut, dprior, start, i_end, i_j, J: tl.constexpr,
    WARPS_J: tl.constexpr, UNROLL_J: tl.constexpr, STEP_I: tl.constexpr,
):  # fmt: skip
    """dprior of a step and a tile of J, UNROLL_J tiles [WARPS_J, STEP_I, 8]."""
    i = tl.arange(0, STEP_I).to(start.dtype)[None, :]
    for n in tl.static_range(UNROLL_J):
        j = i_j + n * WARPS_J + tl.arange(0, WARPS_J)[:, None]
        mask = (i < i_end - start) & (j < J)
        store_share(logits_ptr, p_part, cut, start * J, i * J + j, tl.sum(dprior[n], axis=2), mask)


@triton.jit(do_not_specialize=["first", "whole", "cut", "pieces", "batch_tiles"])
def routing_gradients_kernel(
    u_ptr,  # [B, I, K], or a grid (windows.py)
    weight_ptr,  # [I // WEIGHT_SHARING, J, D, K]
    logits_ptr,  # [I, J] or None
    table_ptr,  # [tiles of 8 samples, R, 2, J padded to whole tiles, 16 BLOCK_D] (table.py)
    statistics_ptr,  # [R, 3, B, I]: of the softmax where J takes several tiles, else None
    grad_u_ptr,  # [B, I, K] or None, written
    du_ptr,  # [B, I, K]: sums over the tiles of J, where there are several; may be grad_u
    grad_weight_ptr,  # [I // WEIGHT_SHARING, J, D, K] or None, written
    grad_logits_ptr,  # [I, J] or None, written
    weight_parts_ptr,  # [pieces x parts, rows that are cut, J, D, K] or None, written
    logits_parts_ptr,  # [pieces, capsules that are cut, J] or None, written
    finished_ptr,  # [rows that are cut]: how many of their programs have finished, 0 at first; None
    # where launches of their own add the parts
    B,
    I,
    first,  # the first iteration whose coupling is not uniform
    iterations,  # R
    parts,  # into which the capsules of a row are cut
    capsules,  # of a part
    whole,  # rows that a program takes alone; 0 where rows have parts
    cut,  # rows after them, times their parts: their batch is cut
    pieces,  # into so many pieces
    batch_tiles,  # tiles of 8 samples of a piece
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

    Grid: (whole + cut x pieces,). The row is that of STEP_I capsules where weights aren't shared.
    Where several programs contribute to a row, each leaves its part, and the last one to finish
    adds them.
    """
    N: tl.constexpr = STEP_I * BLOCK_K
    CELL: tl.constexpr = 16 * BLOCK_D
    TILE_J: tl.constexpr = WARPS_J * UNROLL_J
    PADDED_J: tl.constexpr = (J + TILE_J - 1) // TILE_J * TILE_J
    TABLE: tl.constexpr = 2 * PADDED_J * CELL  # of an iteration and a tile of samples
    PRESENT_J: tl.constexpr = J if J <= TILE_J else PADDED_J  # of a tile's first ones
    ROW_CAPSULES: tl.constexpr = STEP_I if WEIGHT_SHARING == 1 else WEIGHT_SHARING
    ROW_WEIGHTS: tl.constexpr = J * D * K * (STEP_I if WEIGHT_SHARING == 1 else 1)
    ROW_LOGITS: tl.constexpr = ROW_CAPSULES * J
    i_first, i_end, b_first, b_end = share_of_program(
        whole, cut, parts, capsules, batch_tiles, B, I, ROW_CAPSULES, BLOCK_B, OFFSET
    )
    plane = as_offset(B, OFFSET) * I
    r_i, r_k = input_rows(STEP_I, BLOCK_K)
    s_i = tl.arange(0, STEP_I)[None, :, None]
    s_b = tl.arange(0, 8)[None, None, :]

    p_weight = weight_ptr + i_first // WEIGHT_SHARING * (J * D * K)
    for i_j in range(0, J, TILE_J):
        W = ()
        dW = ()
        for n in tl.static_range(UNROLL_J):
            W += (load_weights(
                p_weight, i_end - i_first, i_j + n * WARPS_J, J, K, D,
                WEIGHT_SHARING, WARPS_J, STEP_I, BLOCK_D, BLOCK_K, ACC, OFFSET,
            ),)  # fmt: skip
            dW += (tl.zeros([WARPS_J, N, BLOCK_D], ACC),)
        steps = 1 if WEIGHT_SHARING == 1 else tl.cdiv(i_end - i_first, STEP_I)
        for step in range(steps):
            start = i_first + step * STEP_I
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
                p_tile = table_ptr + as_offset(tile, OFFSET) * iterations * TABLE
                p_tile += as_offset(i_j, OFFSET) * CELL
                i_b = (tile * 8 + s_b).to(OFFSET)
                for t in tl.range(
                    FIRST_T if UNROLL_T > 1 else first,
                    FIRST_T + UNROLL_T if UNROLL_T > 1 else iterations + 1,
                    loop_unroll_factor=UNROLL_T,
                ):
                    p_iteration = p_tile + as_offset(t - 1, OFFSET) * TABLE
                    P = ()
                    b = ()
                    dc = ()
                    for n in tl.static_range(UNROLL_J):
                        x_n = states_over_d(
                            p_iteration + n * WARPS_J * CELL,
                            PRESENT_J - n * WARPS_J, WARPS_J, BLOCK_D, PAIRED,
                        )  # fmt: skip
                        P_n = product(W[n], x_n, ACC, PRECISION)
                        P += (P_n,)
                        dc_n, b_n = arrays_apart(over_rows(u * P_n, STEP_I, BLOCK_K))
                        # V^0 is 0: what is not finite in W or dl does not count in iteration 1.
                        b_n = b_n if UNIFORM else tl.where(t > 1, b_n, 0.0)
                        if (logits_ptr is not None) or ((n + 1) * WARPS_J > (J - 1) % TILE_J + 1):
                            b_n += prior[n]
                        b += (b_n,)
                        dc += (dc_n,)
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
                            p_iteration + (PADDED_J + n * WARPS_J) * CELL,
                            PRESENT_J - n * WARPS_J, WARPS_J, BLOCK_D, PAIRED,
                        )  # fmt: skip
                        dW_next += (
                            dW[n] + product(operand_columns(y * u, PAIRED), x_n, ACC, PRECISION),
                        )
                    dW = dW_next
                    dprior = dprior_new
                if UNIFORM:  # ds^1 of the table bears the coupling; V^0 is 0
                    dW_new = ()
                    for n in tl.static_range(UNROLL_J):
                        x = states_over_d(
                            p_tile + n * WARPS_J * CELL,
                            PRESENT_J - n * WARPS_J, WARPS_J, BLOCK_D, PAIRED,
                        )  # fmt: skip
                        du += product(W[n], x, ACC, PRECISION)
                        x = states_over_b(
                            p_tile + (PADDED_J + n * WARPS_J) * CELL,
                            PRESENT_J - n * WARPS_J, WARPS_J, BLOCK_D, PAIRED,
                        )  # fmt: skip
                        dW_new += (dW[n] + product(operand_columns(u, PAIRED), x, ACC, PRECISION),)
                    dW = dW_new
                if grad_u_ptr is not None:
                    du = lanes_together(tl.sum(tl.reshape(du, [WARPS_J, N, 2, 8]), axis=2))
                    du = lanes_apart(tl.reshape(tl.sum(du, axis=0), [1, N * 8]), N, 8)
                    du = tl.reshape(du, [N, 8])
                    u_b = (tile * 8 + tl.arange(0, 8)).to(OFFSET)
                    o_u = sample_offset(u_b, I, K, None)[None, :]
                    o_u += (capsule_offset(start + r_i, K, None) + r_k)[:, None]
                    m_u = (u_b < B)[None, :] & ((start + r_i < i_end) & (r_k < K))[:, None]
                    if J > TILE_J:
                        if i_j > 0:
                            du += tl.load(du_ptr + o_u, mask=m_u, other=0.0)
                        tl.store(du_ptr + o_u, du, mask=m_u)
                    if i_j + TILE_J >= J:
                        tl.store(grad_u_ptr + o_u, du.to(grad_u_ptr.dtype.element_ty), mask=m_u)
            if grad_logits_ptr is not None:
                row, _, piece = row_of_share(i_first, b_end, capsules, batch_tiles, ROW_CAPSULES)
                p_part = part_of_gradient(
                    logits_parts_ptr, piece, as_offset(whole, OFFSET) * ROW_LOGITS,
                    as_offset(I, OFFSET) * J,
                )  # fmt: skip
                store_prior_gradients(
                    grad_logits_ptr, p_part, row >= whole, dprior, start, i_end, i_j, J,
                    WARPS_J, UNROLL_J, STEP_I,
                )  # fmt: skip
        if grad_weight_ptr is not None:
            row, part, piece = row_of_share(i_first, b_end, capsules, batch_tiles, ROW_CAPSULES)
            p_part = part_of_gradient(
                weight_parts_ptr, piece * parts + part, as_offset(whole, OFFSET) * ROW_WEIGHTS,
                as_offset(I // WEIGHT_SHARING, OFFSET) * (J * D * K),
            )  # fmt: skip
            store_weight_gradients(
                grad_weight_ptr, p_part, row >= whole, dW, row * ROW_WEIGHTS, i_end - i_first,
                i_j, J, K, D,
                WEIGHT_SHARING, WARPS_J, UNROLL_J, STEP_I, BLOCK_D, BLOCK_K, OFFSET,
            )  # fmt: skip
        if J > TILE_J:
            tl.debug_barrier()  # du of this tile of J, before other threads add to it
    if finished_ptr is not None:
        row, _, _ = row_of_share(i_first, b_end, capsules, batch_tiles, ROW_CAPSULES)
        if row >= whole:  # noqa: SIM102, as `and` would evaluate both
            if last_of(finished_ptr + (row - whole), parts * pieces):
                add_parts(
                    grad_weight_ptr, weight_parts_ptr, parts * pieces, row, ROW_WEIGHTS,
                    as_offset(whole, OFFSET) * ROW_WEIGHTS,
                    as_offset(I // WEIGHT_SHARING, OFFSET) * (J * D * K), ACC, OFFSET,
                )  # fmt: skip
                add_parts(
                    grad_logits_ptr, logits_parts_ptr, pieces, row, ROW_LOGITS,
                    as_offset(whole, OFFSET) * ROW_LOGITS, as_offset(I, OFFSET) * J, ACC, OFFSET,
                )  # fmt: skip
