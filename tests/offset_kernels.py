"""Kernels that tell offsets, for the interpreter."""

import triton
import triton.language as tl

from capsule_kernels.backends.triton.blocks import as_offset
from capsule_kernels.backends.triton.gradients import weight_cells, weight_rows
from capsule_kernels.backends.triton.windows import capsule_offset, sample_offset


@triton.jit
def last_offsets_kernel(
    last_ptr,  # [2], int64, written
    J: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    STEP_I: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Of the last sweep's weights, the largest offset that is read and that is written in a step
    of the last output capsule."""
    SIZE: tl.constexpr = D * STEP_I * K
    cells, present = weight_cells(STEP_I, J - 1, J, K, D, 1, 1, STEP_I, D, K, OFFSET)
    cells = tl.where(present, cells, 0)
    tl.store(last_ptr, tl.max(tl.reshape(cells, [SIZE]), axis=0))
    rows, present = weight_rows(STEP_I, J - 1, J, K, D, 1, 1, STEP_I, D, K, OFFSET)
    rows = tl.where(present, rows, 0)
    tl.store(last_ptr + 1, tl.max(tl.reshape(rows, [SIZE]), axis=0))


@triton.jit
def last_input_kernel(
    last_ptr,  # [1], int64, written
    B,
    I,
    K: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Where the last capsule of the last sample of u [B, I, K] begins."""
    sample = sample_offset(as_offset(B, OFFSET) - 1, I, K, None)
    tl.store(last_ptr, sample + capsule_offset(as_offset(I, OFFSET) - 1, K, None))
