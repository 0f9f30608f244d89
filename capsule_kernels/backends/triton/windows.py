"""Where input capsules lie, in windows of a grid too, and the sum of their gradients there.

A kernel's ``WINDOW`` is None where u is [B, I, K]. Where u is a grid [B, H, W, C, K], a sample is a
position (b, y, x) of the window and an input capsule a (c, dy, dx), as in ``ops.FORWARD_SCHEMA``.
WINDOW is then (H, W, C, kh, kw, rows of a step, columns of a step), constants, by which a division
is a multiplication. Element k of a capsule lies at sample_offset + capsule_offset + k.
"""

import triton
import triton.language as tl

from .blocks import as_offset


@triton.jit
def sample_offset(i_b, I, K: tl.constexpr, WINDOW: tl.constexpr):
    """Where sample b begins, or the window (b, y, x); ``i_b`` is of the offsets' dtype."""
    if WINDOW is None:
        offset = i_b * (as_offset(I, i_b.dtype) * K)
    else:
        H: tl.constexpr = WINDOW[0]
        W: tl.constexpr = WINDOW[1]
        C: tl.constexpr = WINDOW[2]
        ROWS: tl.constexpr = (H - WINDOW[3]) // WINDOW[5] + 1
        COLUMNS: tl.constexpr = (W - WINDOW[4]) // WINDOW[6] + 1
        x = i_b % COLUMNS * WINDOW[6]
        y = i_b // COLUMNS % ROWS * WINDOW[5]
        offset = ((i_b // (COLUMNS * ROWS) * H + y) * W + x) * (C * K)
    return offset


@triton.jit
def capsule_offset(i, K: tl.constexpr, WINDOW: tl.constexpr):
    """How far from there input capsule i lies, or (c, dy, dx)."""
    if WINDOW is None:
        offset = i * K
    else:
        W: tl.constexpr = WINDOW[1]
        C: tl.constexpr = WINDOW[2]
        kh: tl.constexpr = WINDOW[3]
        kw: tl.constexpr = WINDOW[4]
        offset = ((i // kw % kh * W + i % kw) * C + i // (kh * kw)) * K
    return offset


@triton.jit
def grid_gradient_kernel(
    du_ptr,  # [B H' W', C kh kw, K]: gradients of the windows' capsules
    grad_u_ptr,  # [B, H, W, C, K], written
    size,  # elements of the grid
    K: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    OFFSET: tl.constexpr,
    ACC: tl.constexpr,
):
    """The gradient of the grid, in the order of places in the window. Grid: (blocks of elements,).

    A cell is gathered from all windows that it is in: no two programs add to the same element.
    """
    H: tl.constexpr = WINDOW[0]
    W: tl.constexpr = WINDOW[1]
    C: tl.constexpr = WINDOW[2]
    kh: tl.constexpr = WINDOW[3]
    kw: tl.constexpr = WINDOW[4]
    down: tl.constexpr = WINDOW[5]
    right: tl.constexpr = WINDOW[6]
    ROWS: tl.constexpr = (H - kh) // down + 1
    COLUMNS: tl.constexpr = (W - kw) // right + 1
    n = tl.program_id(0).to(OFFSET) * BLOCK + tl.arange(0, BLOCK)
    k = n % K
    c = n // K % C
    column = n // (K * C) % W
    row = n // (K * C * W) % H
    b = n // (K * C * W * H)
    total = tl.zeros([BLOCK], ACC)
    for dy in range(0, kh, down):  # of those that differ by whole steps one is a row's own
        y = row // down - dy // down
        i_y = row % down + dy
        m_y = (y >= 0) & (y < ROWS) & (i_y < kh)
        for dx in range(0, kw, right):
            x = column // right - dx // right
            i_x = column % right + dx
            mask = m_y & (x >= 0) & (x < COLUMNS) & (i_x < kw) & (n < size)
            i_b = (b * ROWS + y) * COLUMNS + x
            i = (c * kh + i_y) * kw + i_x
            total += tl.load(du_ptr + (i_b * (C * kh * kw) + i) * K + k, mask=mask, other=0.0)
    tl.store(grad_u_ptr + n, total.to(grad_u_ptr.dtype.element_ty), mask=n < size)
