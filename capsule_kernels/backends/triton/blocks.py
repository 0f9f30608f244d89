"""Device functions that all kernels share: tiles, products, squash and its derivative.

Names: sizes in capitals, ``i_`` an index, ``m_`` a mask; a tensor's shape stands after it. All
arithmetic is in the accumulation dtype, whatever the tensors' own.
"""

import triton
import triton.language as tl


@triton.jit
def as_offset(x, OFFSET: tl.constexpr):
    """A whole number as a scalar tensor of the offsets' dtype; a plain int has none to cast."""
    return tl.full([], 0, OFFSET) + x


@triton.jit
def tiles_of_program(B, BLOCK_B: tl.constexpr, FLAT: tl.constexpr, OFFSET: tl.constexpr):
    """The first sample of a program's batch tile, and which tile of something else it has.

    Neighbours along the first axis of the grid have other samples. The other tiles lie along the
    third, or FLAT, behind the batch tiles along the first (``config.grid``).
    """
    if FLAT:
        tiles_B = tl.cdiv(B, BLOCK_B)
        tile_b = tl.program_id(0) % tiles_B
        tile = tl.program_id(0) // tiles_B
    else:
        tile_b = tl.program_id(0)
        tile = tl.program_id(2)
    return as_offset(tile_b, OFFSET) * BLOCK_B, tile


@triton.jit
def split_float32(x):
    """x = high + low, where TF32 holds high exactly and low but for 2^-23 |x|."""
    bits = x.to(tl.int32, bitcast=True)
    high = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)  # rounded to 11 bits
    return high, x - high


@triton.jit
def product(a, b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """The matrix product a b, in the precision that ``device.precision_of`` chose.

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
