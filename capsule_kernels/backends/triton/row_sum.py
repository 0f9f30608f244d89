"""The sum of partial gradients, and of what every sample adds to a gradient."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def row_sum_kernel(
    x_ptr,  # [rows, columns]
    sum_ptr,  # [columns], written
    rows,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ACC: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """The sum over rows, in fixed order. Grid: (tiles of columns,)."""
    i_column = tl.program_id(0).to(OFFSET) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    m_column = i_column < columns
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], ACC)
    for start in range(0, rows, BLOCK_ROWS):
        i_row = (start + tl.arange(0, BLOCK_ROWS)).to(OFFSET)
        total += tl.load(
            x_ptr + i_row[:, None] * columns + i_column[None, :],
            mask=(i_row < rows)[:, None] & m_column[None, :],
            other=0.0,
        )
    tl.store(sum_ptr + i_column, tl.sum(total, axis=0).to(sum_ptr.dtype.element_ty), mask=m_column)
