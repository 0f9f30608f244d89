"""How the programs of the last sweep share the rows of the weights, and add what each contributes.

The first ``whole`` rows take a program each. Of the others the capsules are cut into ``parts`` and
the batch into ``pieces`` (``config.split``). Their programs leave parts of a gradient in a
workspace: [parts of a row, rows that are cut, ...].
"""

import triton
import triton.language as tl

from .blocks import as_offset


@triton.jit
def share_of_program(
    whole, cut, parts, capsules, batch_tiles, B, I, ROW_CAPSULES: tl.constexpr,
    BLOCK_B: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """First and last input capsule and tile of samples of this program."""
    i_cut = tl.program_id(0) - whole
    unit = tl.where(i_cut < 0, tl.program_id(0), whole + i_cut % cut)
    row = as_offset(unit // parts, OFFSET)
    i_first = row * ROW_CAPSULES + unit % parts * capsules
    i_end = min(min(i_first + capsules, (row + 1) * ROW_CAPSULES), I)
    tiles = tl.cdiv(B, BLOCK_B)
    b_first = tl.where(i_cut < 0, 0, i_cut // cut * batch_tiles)
    b_end = tl.where(i_cut < 0, tiles, min(b_first + batch_tiles, tiles))
    return i_first, i_end, b_first, b_end


@triton.jit
def row_of_share(
    i_first, b_end, capsules, batch_tiles, ROW_CAPSULES: tl.constexpr
):  # fmt: skip
    """Row, part and piece of a share: when it is done, because in its loops registers are dear."""
    row = i_first // ROW_CAPSULES
    return row, (i_first - row * ROW_CAPSULES) // capsules, (b_end - 1) // batch_tiles


@triton.jit
def part_of_gradient(parts_ptr, index, whole, size):
    """Where to store part ``index`` of a gradient of ``size`` elements, of which ``whole`` are not
    cut, so that the gradient's own offsets apply; None if there are no parts."""
    p = parts_ptr
    if parts_ptr is not None:
        p = parts_ptr + (index * (size - whole) - whole)
    return p


@triton.jit
def store_share(ptr, p_part, cut, first, offsets, x, mask):
    """x from element ``first`` on, to its part if its row is cut, else to the gradient."""
    if p_part is None:
        tl.store(ptr + first + offsets, x.to(ptr.dtype.element_ty), mask=mask)
    else:
        if cut:
            tl.store(p_part + first + offsets, x, mask=mask)
        else:
            tl.store(ptr + first + offsets, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def last_of(p_finished, programs):
    """Whether this is the last of so many programs to come here.

    All have stored their parts by then, and the last one sees them: the barrier puts every thread's
    stores before the count, and the count releases and acquires. Nobody waits for anybody.
    """
    tl.debug_barrier()
    return tl.atomic_add(p_finished, 1, sem="acq_rel", scope="gpu") == programs - 1


@triton.jit
def sum_of_partials(partial_ptr, offsets, mask, size, num_partials, ACC: tl.constexpr):
    """Sum of ``num_partials`` tensors of ``size`` elements each, in fixed order."""
    total = tl.zeros(offsets.shape, ACC)
    for _ in tl.range(num_partials, loop_unroll_factor=4):  # four loads under way at a time
        total += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
        partial_ptr += size
    return total


@triton.jit
def add_parts(
    gradient_ptr, parts_ptr, number, row, row_size, whole, size,
    ACC: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """One row of a gradient: its parts, added in their order whoever adds them."""
    BLOCK: tl.constexpr = 2048
    if parts_ptr is not None:
        first = row * row_size
        end = min(first + row_size, size)
        p_first = part_of_gradient(parts_ptr, 0, whole, size)
        for start in range(first, end, BLOCK):
            offsets = as_offset(start, OFFSET) + tl.arange(0, BLOCK)
            mask = offsets < end
            total = sum_of_partials(p_first, offsets, mask, size - whole, number, ACC)
            tl.store(gradient_ptr + offsets, total.to(gradient_ptr.dtype.element_ty), mask=mask)
