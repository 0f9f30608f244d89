"""Device functions that all kernels share: tiles, squash and its derivative, coupling coefficients.

Names: sizes in capitals, ``i_`` an index, ``m_`` a mask; a tensor's shape stands after it. All
arithmetic is in the accumulation dtype, whatever the tensors' own.
"""

import triton
import triton.language as tl


@triton.jit
def wide(x, OFFSET: tl.constexpr):
    """A whole number as a scalar tensor of the offsets' dtype (a plain int has no dtype to cast)."""
    return tl.full([], 0, OFFSET) + x


@triton.jit
def prediction_vectors(
    u_ptr, weight_ptr, i_b, i, i_j, B, I, WEIGHT_SHARING: tl.constexpr,
    J: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Input capsule i of a batch tile, its weights, and u_hat = W u of a tile of output capsules.

    ``i_b`` [BLOCK_B] and ``i`` carry the width of the offsets (int32 or int64); ``i_j`` is the
    first output capsule.
    """
    i_k = tl.arange(0, BLOCK_K)
    i_n = tl.arange(0, BLOCK_J * BLOCK_D)  # (j, d) of the tile
    j = i_j + i_n // BLOCK_D
    d = i_n % BLOCK_D
    m_u = (i_b < B)[:, None] & (i_k < K)[None, :]
    m_w = ((j < J) & (d < D))[:, None] & (i_k < K)[None, :]
    u = tl.load(u_ptr + (i_b * I + i)[:, None] * K + i_k[None, :], mask=m_u, other=0.0)
    row = i // WEIGHT_SHARING
    w_offsets = (j * D + d)[:, None] * K + i_k[None, :]
    W = tl.load(weight_ptr + row * (J * D * K) + w_offsets, mask=m_w, other=0.0)
    u = u.to(ACC)  # [BLOCK_B, BLOCK_K]
    W = W.to(ACC)  # [BLOCK_J * BLOCK_D, BLOCK_K]
    u_hat = tl.dot(u, tl.trans(W), input_precision=PRECISION, out_dtype=ACC)
    return u, W, tl.reshape(u_hat, [BLOCK_B, BLOCK_J, BLOCK_D])


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
    for _ in range(num_partials):
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
def prior_logits(logits_ptr, i, i_j, J: tl.constexpr, BLOCK_J: tl.constexpr, ACC: tl.constexpr):
    """Log priors of input capsule i, [1, BLOCK_J]; -inf beyond J, so that the coupling there is 0."""
    j = i_j + tl.arange(0, BLOCK_J)
    if logits_ptr is None:
        prior = tl.where(j < J, 0.0, float("-inf")).to(ACC)
    else:
        prior = tl.load(logits_ptr + i * J + j, mask=j < J, other=float("-inf")).to(ACC)
    return prior[None, :]


@triton.jit
def agreement(u_hat, x):
    """u_hat . x over d: [BLOCK_B, BLOCK_J, BLOCK_D] twice to [BLOCK_B, BLOCK_J]."""
    return tl.sum(u_hat * x, axis=2)


@triton.jit
def maximum_and_sum(b, LEAKY: tl.constexpr):
    """The softmax's maximum and sum over J of logits b [BLOCK_B, BLOCK_J]: [BLOCK_B, 1] each."""
    maximum = tl.max(b, axis=1, keep_dims=True)
    if LEAKY:
        maximum = tl.maximum(maximum, 0.0)
    total = tl.sum(tl.exp(b - maximum), axis=1, keep_dims=True)
    if LEAKY:
        total += tl.exp(-maximum)
    return maximum, total


@triton.jit
def agreement_vectors(s_ptr, offsets, mask, size, t, ACC: tl.constexpr):
    """V^t = v^1 + ... + v^t of a tile, from the total inputs s^1 ... s^t."""
    V = tl.zeros(offsets.shape, ACC)
    for _ in range(t):
        V += squash(tl.load(s_ptr + offsets, mask=mask, other=0.0))
        s_ptr += size
    return V
