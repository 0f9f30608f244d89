"""The table of ds^t and V^(t-1) that the state kernel leaves for the last sweep.

It holds them in the order in which the last sweep's threads want them, twice: they are contracted
over d in its first product and over samples in its second.
"""

import triton
import triton.language as tl


@triton.jit
def table_offsets(which, b, d, PAIRED: tl.constexpr):
    """Where element d of sample b (of 8) lies in a cell of ds (``which`` 0) or V (1) of one j.

    Twice: for contractions over d, then over samples. Innermost are the four numbers that a thread
    holds of two operands of a matrix instruction, two of each, then the threads of a warp. The two
    are four apart in a contraction; PAIRED, they are eight apart, and those of the next instruction
    stand beside them: so Triton wants operands that were 16 bits wide.
    """
    if PAIRED:
        over_d = (d // 16 * 2 + d % 2) * 128 + b * 16 + d % 8 // 2 * 4 + which * 2 + d // 8 % 2
        over_b = d // 8 * 128 + d % 8 * 16 + b * 2 + which
    else:
        over_d = d // 8 * 128 + b * 16 + d % 4 * 4 + which * 2 + d // 4 % 2
        over_b = d // 8 * 128 + d % 8 * 16 + b // 2 * 4 + which * 2 + b % 2
    return over_d, over_b


@triton.jit
def cells(p, PRESENT_J: tl.constexpr, WARPS_J: tl.constexpr, BLOCK_D: tl.constexpr):
    """Cells of WARPS_J output capsules, [WARPS_J, BLOCK_D // 8, 8, 4, 2, 2].

    The threads of all warps make one axis, along which each loads 16 bytes beside its neighbour's:
    so every version of Triton gives a thread its own. Warps beyond PRESENT_J read what the last
    one before them reads, so nothing more is fetched: their W and c are 0.
    """
    x = tl.arange(0, WARPS_J * 128)[None, :]
    n = tl.arange(0, BLOCK_D // 8)[:, None]
    w = tl.minimum(x // 128, PRESENT_J - 1)
    x = tl.load(p + (w * (16 * BLOCK_D) + n * 128 + x % 128))
    x = tl.permute(tl.reshape(x, [BLOCK_D // 8, WARPS_J, 128]), (1, 0, 2))
    return tl.reshape(x, [WARPS_J, BLOCK_D // 8, 8, 4, 2, 2])


@triton.jit
def states_over_d(
    p, PRESENT_J: tl.constexpr, WARPS_J: tl.constexpr, BLOCK_D: tl.constexpr, PAIRED: tl.constexpr
):  # fmt: skip
    """ds and V transposed, [WARPS_J, BLOCK_D, 16]."""
    x = cells(p, PRESENT_J, WARPS_J, BLOCK_D)
    if PAIRED:
        x = tl.reshape(x, [WARPS_J, BLOCK_D // 16, 2, 8, 4, 2, 2])
        x = tl.permute(x, (0, 1, 6, 4, 2, 5, 3))
    else:
        x = tl.permute(x, (0, 1, 5, 3, 4, 2))
    return tl.reshape(x, [WARPS_J, BLOCK_D, 16])


@triton.jit
def states_over_b(
    p, PRESENT_J: tl.constexpr, WARPS_J: tl.constexpr, BLOCK_D: tl.constexpr, PAIRED: tl.constexpr
):  # fmt: skip
    """ds and V in the order of samples that operand_columns makes, [WARPS_J, 16, BLOCK_D]."""
    x = cells(p, PRESENT_J, WARPS_J, BLOCK_D)
    x = tl.permute(x, (0, 5, 3, 4, 1, 2) if PAIRED else (0, 4, 5, 3, 1, 2))
    return tl.reshape(x, [WARPS_J, 16, BLOCK_D])


@triton.jit
def store_in_table(p_table, ds, V, b, d, mask, to_over_b, PAIRED: tl.constexpr):
    """ds and V where the last sweep reads them, in both orders."""
    over_d, over_b = table_offsets(0, b, d, PAIRED)
    tl.store(p_table + over_d, ds, mask=mask)
    tl.store(p_table + to_over_b + over_b, ds, mask=mask)
    over_d, over_b = table_offsets(1, b, d, PAIRED)
    tl.store(p_table + over_d, V, mask=mask)
    tl.store(p_table + to_over_b + over_b, V, mask=mask)
