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
    # The maximum may pass over a NaN; the length, and with it every component, is NaN all the same.
    poisoned = tl.max((s != s).to(tl.int32), axis=2, keep_dims=True) > 0
    return tl.where(poisoned, float("nan"), v)


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
def agreement_vectors(s_ptr, offsets, mask, size, t, ACC: tl.constexpr):
    """V^t = v^1 + ... + v^t of a tile, from the total inputs s^1 ... s^t."""
    V = tl.zeros(offsets.shape, ACC)
    for _ in range(t):
        V += squash(tl.load(s_ptr + offsets, mask=mask, other=0.0))
        s_ptr += size
    return V
