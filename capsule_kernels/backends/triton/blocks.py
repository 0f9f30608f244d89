"""Device functions that all kernels share: tiles, squash and its derivative, coupling coefficients.

Names: sizes in capitals, ``i_`` an index, ``m_`` a mask; a tensor's shape stands after it. All
arithmetic is in the accumulation dtype, whatever the tensors' own.
"""

import triton
import triton.language as tl


@triton.jit
def wide(x, OFFSET: tl.constexpr):
    """A whole number as a scalar tensor of the offsets' dtype; a plain int has none to cast."""
    return tl.full([], 0, OFFSET) + x


@triton.jit
def split_float32(x):
    """x = high + low, where TF32 holds high exactly and low but for 2^-23 |x|."""
    bits = x.to(tl.int32, bitcast=True)
    high = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)  # rounded to 11 bits
    return high, x - high


@triton.jit
def product(a, b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """The matrix product a b, in the precision that ``launch.precision_of`` chose.

    "tf32x3" is float32 as three TF32 products, the smallest first; what is left out, low by low,
    is below 2^-22 |a| |b|. (Triton's own "tf32x3" spends twice the instructions, on telling
    infinity from NaN: here infinite operands give NaN.)
    """
    if PRECISION == "tf32x3":
        a_high, a_low = split_float32(a)
        b_high, b_low = split_float32(b)
        c = tl.dot(a_low, b_high, input_precision="tf32")
        c = tl.dot(a_high, b_low, c, input_precision="tf32")
        c = tl.dot(a_high, b_high, c, input_precision="tf32")
    else:
        c = tl.dot(a, b, input_precision=PRECISION, out_dtype=ACC)
    return c


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
def capsules_to_columns(x, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of columns_to_capsules."""
    PAIR: tl.constexpr = 2 if BLOCK_D > 1 else 1
    x = tl.reshape(x, [x.shape[0], BLOCK_J, BLOCK_D // PAIR, PAIR])
    return tl.reshape(tl.permute(x, (0, 2, 1, 3)), [x.shape[0], BLOCK_J * BLOCK_D])


@triton.jit
def gradient_of_input(
    du_hat, W, PARTS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """du = sum_j W_j^T du_hat_j, [BLOCK_B, BLOCK_K].

    As a batched product over PARTS groups of j, added at the end: each warp then multiplies the
    part of du_hat that it holds. The order (d, j) within a group is the one it holds it in.
    """
    B: tl.constexpr = du_hat.shape[0]
    K: tl.constexpr = W.shape[1]
    GROUP: tl.constexpr = BLOCK_J // PARTS
    PAIR: tl.constexpr = 2 if BLOCK_D > 1 else 1
    x = tl.permute(tl.reshape(du_hat, [B, PARTS, GROUP, BLOCK_D]), (1, 0, 3, 2))
    x = tl.reshape(x, [PARTS, B, BLOCK_D * GROUP])
    W = tl.reshape(W, [BLOCK_D // PAIR, PARTS, GROUP, PAIR, K])
    W = tl.reshape(tl.permute(W, (1, 0, 3, 2, 4)), [PARTS, BLOCK_D * GROUP, K])
    return tl.sum(product(x, W, ACC, PRECISION), axis=0)


@triton.jit
def input_capsule(
    u_ptr, i_b, i, B, I, K: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Input capsule i of the samples i_b, [BLOCK_B, BLOCK_K]."""
    i_k = tl.arange(0, BLOCK_K)
    mask = (i_b < B)[:, None] & (i_k < K)[None, :]
    return tl.load(u_ptr + (i_b * I + i)[:, None] * K + i_k[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def weight_offsets(
    i_j, J: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Offsets and mask of a tile [BLOCK_J * BLOCK_D, BLOCK_K] of one row of the weights."""
    j, d = column_of(BLOCK_J, BLOCK_D)
    j += i_j
    i_k = tl.arange(0, BLOCK_K)
    return (j * D + d)[:, None] * K + i_k[None, :], ((j < J) & (d < D))[:, None] & (i_k < K)[
        None, :
    ]


@triton.jit
def weight_tile(
    weight_ptr, row, i_j, J: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """W of one row of the weights and a tile of output capsules, [BLOCK_J * BLOCK_D, BLOCK_K]."""
    offsets, mask = weight_offsets(i_j, J, K, D, BLOCK_J, BLOCK_D, BLOCK_K)
    return tl.load(weight_ptr + row * (J * D * K) + offsets, mask=mask, other=0.0).to(ACC)


@triton.jit
def prediction_vectors(
    u, W, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr
):
    """u_hat = W u, [BLOCK_B, BLOCK_J, BLOCK_D]."""
    u_hat = product(u, tl.trans(W), ACC, PRECISION)
    return columns_to_capsules(u_hat, BLOCK_J, BLOCK_D)


@triton.jit
def state_offsets(
    i_b, i_j, B, J: tl.constexpr, D: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Offsets and mask of a tile [BLOCK_B, BLOCK_J, BLOCK_D] of a [B, J, D] tensor."""
    j = i_j + tl.arange(0, BLOCK_J)
    d = tl.arange(0, BLOCK_D)
    offsets = i_b[:, None, None] * (J * D) + (j * D)[None, :, None] + d[None, None, :]
    mask = (i_b < B)[:, None, None] & (j < J)[None, :, None] & (d < D)[None, None, :]
    return offsets, mask


@triton.jit
def table_offsets(b, j, d, J: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets of (b, j, d), shapes that broadcast, in a table [B, BLOCK_D // Q, J, Q].

    Q = 4 (or BLOCK_D if that is less); B, J and D are padded to whole tiles, with zeros, so that
    tiles of a table need no masks.
    """
    Q: tl.constexpr = 4 if BLOCK_D >= 4 else BLOCK_D
    PADDED_J: tl.constexpr = (J + BLOCK_J - 1) // BLOCK_J * BLOCK_J
    return b * (BLOCK_D * PADDED_J) + (d // Q) * (PADDED_J * Q) + j * Q + d % Q


@triton.jit
def lane_offsets(i_b, i_j, J: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets of a tile [BLOCK_J, BLOCK_B, BLOCK_D // Q, Q] of such a table.

    Loaded so, with Q neighbours a thread and then j along the threads, a thread holds all d of
    one j: as in column_of, u_hat . V needs no exchange; and here the softmax stays in a warp.
    """
    Q: tl.constexpr = 4 if BLOCK_D >= 4 else BLOCK_D
    b = i_b[None, :, None, None]
    # Beyond J the last j again, at no traffic of its own: there c and dl are 0, and so is W.
    j = tl.minimum(i_j + tl.arange(0, BLOCK_J), J - 1)[:, None, None, None]
    d = (tl.arange(0, BLOCK_D // Q) * Q)[None, None, :, None] + tl.arange(0, Q)[None, None, None, :]
    return table_offsets(b, j, d, J, BLOCK_J, BLOCK_D)


@triton.jit
def capsules_to_lanes(x, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_B, BLOCK_J, BLOCK_D] to [BLOCK_J, BLOCK_B, BLOCK_D // Q, Q]."""
    Q: tl.constexpr = 4 if BLOCK_D >= 4 else BLOCK_D
    x = tl.reshape(x, [x.shape[0], BLOCK_J, BLOCK_D // Q, Q])
    return tl.permute(x, (1, 0, 2, 3))


@triton.jit
def lanes_to_capsules(x, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of capsules_to_lanes."""
    return tl.reshape(tl.permute(x, (1, 0, 2, 3)), [x.shape[1], BLOCK_J, BLOCK_D])


@triton.jit
def lane_agreement(u_hat, x):
    """u_hat . x over d: [BLOCK_J, BLOCK_B, BLOCK_D // Q, Q] twice to [BLOCK_B, BLOCK_J]."""
    return tl.trans(tl.sum(tl.sum(u_hat * x, axis=3), axis=2))


@triton.jit
def over_lanes(c):
    """[BLOCK_B, BLOCK_J] so that it multiplies [BLOCK_J, BLOCK_B, BLOCK_D // Q, Q]."""
    return tl.trans(c)[:, :, None, None]


@triton.jit
def length_and_direction(s):
    """n = |s| and s / n of vectors along the last axis, with no square that over- or underflows.

    Zero vectors have n = 1 and direction 0: everything derived from the direction vanishes there.
    """
    scale = tl.max(tl.abs(s), axis=2, keep_dims=True)
    scale = tl.where(scale > 0, scale, 1.0)
    unit = s / scale
    length = tl.sqrt(tl.sum(unit * unit, axis=2, keep_dims=True))  # in [1, sqrt(D)], or 0
    length = tl.where(length == 0, 1.0, length)
    return scale * length, unit / length


@triton.jit
def squash(s):
    """v = |s|^2 / (1 + |s|^2) s / |s|, written s / (n + 1 / n) (Sabour et al. 2017, equation 1)."""
    n, _ = length_and_direction(s)
    v = s / (n + 1 / n)
    # Where a component is NaN the oracle keeps it and gives 0 for the others.
    poisoned = tl.max((s != s).to(tl.int32), axis=2, keep_dims=True) > 0
    return tl.where(poisoned, 0.0 * s, v)


@triton.jit
def squash_vjp(s, x):
    """J^T x with J the Jacobian of squash at s: f (x + h (s^ . x) s^), exactly 0 at s = 0."""
    n, direction = length_and_direction(s)
    f = 1 / (n + 1 / n)
    h = 2 / (1 + n * n) - 1
    along = tl.sum(direction * x, axis=2, keep_dims=True)
    zero = tl.max((s != 0).to(tl.int32), axis=2, keep_dims=True) == 0
    return tl.where(zero, 0.0, f * (x + h * along * direction))


@triton.jit
def sum_of_partials(partial_ptr, offsets, mask, size, num_partials, ACC: tl.constexpr):
    """Sum of ``num_partials`` tensors of ``size`` elements each, in fixed order."""
    total = tl.zeros(offsets.shape, ACC)
    for _ in tl.range(num_partials, loop_unroll_factor=4):  # four loads under way at a time
        total += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
        partial_ptr += size
    return total


@triton.jit
def bias_tile(
    bias_ptr,
    i_j,
    J: tl.constexpr,
    D: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """The bias of a tile of output capsules, [1, BLOCK_J, BLOCK_D]."""
    j = i_j + tl.arange(0, BLOCK_J)
    d = tl.arange(0, BLOCK_D)
    mask = (j < J)[:, None] & (d < D)[None, :]
    bias = tl.load(bias_ptr + (j * D)[:, None] + d[None, :], mask=mask, other=0.0)
    return bias.to(ACC)[None, :, :]


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


@triton.jit
def statistic(statistics_ptr, which: tl.constexpr, i_b, i, B, I, other):
    """One of the tabled softmax statistics [3, B, I] of input capsule i, [BLOCK_B, 1]."""
    offsets = (which * wide(B, i_b.dtype) + i_b) * I + i
    return tl.load(statistics_ptr + offsets, mask=i_b < B, other=other)[:, None]


@triton.jit
def coupling_coefficients(b, statistics_ptr, i_b, i, B, I, LEAKY: tl.constexpr):
    """c = softmax over J of the logits b [BLOCK_B, BLOCK_J], from tabled statistics if given."""
    if statistics_ptr is None:
        maximum = tl.max(b, axis=1, keep_dims=True)
        if LEAKY:  # one more logit, 0
            maximum = tl.maximum(maximum, 0.0)
        e = tl.exp(b - maximum)
        total = tl.sum(e, axis=1, keep_dims=True)
        if LEAKY:
            total += tl.exp(-maximum)
    else:
        e = tl.exp(b - statistic(statistics_ptr, 0, i_b, i, B, I, 0.0))
        total = statistic(statistics_ptr, 1, i_b, i, B, I, 1.0)
    return e * (1 / total)


@triton.jit
def logit_gradients(c, dc, statistics_ptr, i_b, i, B, I):
    """dl = c (dc - sum_k c_k dc_k), in the shape of c; the sum over all J tabled if given."""
    if statistics_ptr is None:
        mean = tl.sum(c * dc, axis=1, keep_dims=True)
    else:
        mean = statistic(statistics_ptr, 2, i_b, i, B, I, 0.0)
    return c * (dc - mean)


@triton.jit
def agreement_vectors(s_ptr, offsets, mask, size, t, ACC: tl.constexpr):
    """V^t = v^1 + ... + v^t of a tile, from the total inputs s^1 ... s^t."""
    V = tl.zeros(offsets.shape, ACC)
    for _ in range(t):
        V += squash(tl.load(s_ptr + offsets, mask=mask, other=0.0))
        s_ptr += size
    return V
