"""What the sweeps of forward and backward share: W contracted with what is small.

u_hat is not formed, not even in registers. With a state x, such as V, of [B, J, D],

    u_hat_ij . x_j = u_i . (x_j W_ij)        sum_i y_ij u_hat_ij = sum_i (y_ij u_i) W_ij^T

and both are matrix products that waste little: they contract d, and (i, k) together, and each j is
a product of its own, so J need not be a power of two. They are batched over the WARPS of a program,
WARPS_I x WARPS_J, which share the samples and have input and output capsules of their own. A warp
goes through UNROLL_J output capsules, so a state is a tuple of UNROLL_J tiles.

A warp takes STEP_I input capsules at a time, in N = STEP_I BLOCK_K columns of the order
(k // 2, i, k % 2). A matrix instruction leaves two neighbouring columns with a thread, and the
next three pairs with the next three. So, with four capsules, a thread holds all k of one of them:
u . (x W) needs no exchange between threads, no logit is computed twice, and the softmax meets other
threads only where WARPS_J > 1. As an operand, a matrix instruction wants columns n and n + 4 of
every eight there; those are the same elements in the order (k, i): operand_order() moves nothing.
"""

# A state grows tile by tile, as Triton builds tuples: mypy takes () for the type of all of it.
# mypy: disable-error-code="assignment, misc"

import triton
import triton.language as tl

from .blocks import as_offset, product, squash, squash_vjp, tiles_of_program
from .windows import capsule_offset, sample_offset


@triton.jit
def program_of_sweep(
    B, J: tl.constexpr, D: tl.constexpr, WARPS_J: tl.constexpr, UNROLL_J: tl.constexpr,
    BLOCK_B: tl.constexpr, FLAT: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """First sample, group of input capsules and first output capsule of a program, and the elements
    of a [B, J, D] tensor. Grid: (batch tiles, groups, tiles of J)."""
    b_first, tile_j = tiles_of_program(B, BLOCK_B, FLAT, OFFSET)
    TILE_J: tl.constexpr = WARPS_J * UNROLL_J
    i_j = 0 if J <= TILE_J else tile_j * TILE_J  # where it can be, a constant
    return b_first, tl.program_id(1), i_j, as_offset(B, OFFSET) * (J * D)


@triton.jit
def state_tile(
    x_ptr, i_b, i_j, B, J: tl.constexpr, D: tl.constexpr, WARPS_J: tl.constexpr,
    UNROLL_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pointers and mask of a tile [WARPS_J, BLOCK_B, BLOCK_D] of a [B, J, D] tensor.

    i_j goes into the pointer, so that all tiles share one set of offsets. Where there is but one
    tile, of one sample, it goes into the offsets: loops over tensors then find them done.
    """
    j = tl.arange(0, WARPS_J)
    d = tl.arange(0, BLOCK_D)
    offsets = (j * D)[:, None, None] + i_b[None, :, None] * (J * D) + d[None, None, :]
    mask = (i_j + j < J)[:, None, None] & (i_b < B)[None, :, None] & (d < D)[None, None, :]
    first = as_offset(i_j, i_b.dtype) * D
    if i_b.shape[0] == 1 and UNROLL_J == 1:
        p = x_ptr + (offsets + first)
    else:
        p = x_ptr + first + offsets
    return p, mask


@triton.jit
def load_state(
    x_ptr, i_b, i_j, B, J: tl.constexpr, D: tl.constexpr,
    WARPS_J: tl.constexpr, UNROLL_J: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A state from a [B, J, D] tensor."""
    x = ()
    for index in tl.static_range(UNROLL_J):
        p, mask = state_tile(x_ptr, i_b, i_j + index * WARPS_J, B, J, D, WARPS_J, UNROLL_J, BLOCK_D)
        x += (tl.load(p, mask=mask, other=0.0).to(ACC),)
    return x


@triton.jit
def store_state(
    x_ptr, x, i_b, i_j, B, J: tl.constexpr, D: tl.constexpr,
    WARPS_J: tl.constexpr, UNROLL_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A state to a [B, J, D] tensor."""
    for index in tl.static_range(UNROLL_J):
        p, mask = state_tile(x_ptr, i_b, i_j + index * WARPS_J, B, J, D, WARPS_J, UNROLL_J, BLOCK_D)
        tl.store(p, x[index].to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def zero_state(
    WARPS: tl.constexpr, UNROLL_J: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    x = ()
    for _ in tl.static_range(UNROLL_J):
        x += (tl.zeros([WARPS, BLOCK_B, BLOCK_D], ACC),)
    return x


@triton.jit
def sum_of_states(
    partial_ptr, size, num_partials, i_b, i_j, B, J: tl.constexpr, D: tl.constexpr,
    WARPS_J: tl.constexpr, UNROLL_J: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Sum of ``num_partials`` tensors of ``size`` elements each, in fixed order."""
    total = zero_state(WARPS_J, UNROLL_J, BLOCK_B, BLOCK_D, ACC)
    for _ in tl.range(num_partials, loop_unroll_factor=4):  # loads of four under way at a time
        x = load_state(partial_ptr, i_b, i_j, B, J, D, WARPS_J, UNROLL_J, BLOCK_D, ACC)
        total = plus(total, x, UNROLL_J)
        partial_ptr += size
    return total


@triton.jit
def add_bias(
    x, bias_ptr, i_j, J: tl.constexpr, D: tl.constexpr,
    WARPS_J: tl.constexpr, UNROLL_J: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """A state plus a bias [J, D], which is a state of a single sample."""
    i_b = tl.zeros([1], OFFSET)
    bias = load_state(bias_ptr, i_b, i_j, 1, J, D, WARPS_J, UNROLL_J, BLOCK_D, ACC)
    return plus(x, bias, UNROLL_J)


@triton.jit
def plus(x, y, UNROLL_J: tl.constexpr):
    new = ()
    for index in tl.static_range(UNROLL_J):
        new += (x[index] + y[index],)
    return new


@triton.jit
def squashed(s, UNROLL_J: tl.constexpr):
    new = ()
    for index in tl.static_range(UNROLL_J):
        new += (squash(s[index]),)
    return new


@triton.jit
def squash_vjps(s, x, UNROLL_J: tl.constexpr):
    """J^T x with J the Jacobian of squash at s."""
    new = ()
    for index in tl.static_range(UNROLL_J):
        new += (squash_vjp(s[index], x[index]),)
    return new


@triton.jit
def summed_agreement_vectors(
    s_ptr, size, t, i_b, i_j, B, J: tl.constexpr, D: tl.constexpr,
    WARPS_J: tl.constexpr, UNROLL_J: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """V^t = v^1 + ... + v^t as a state, from the total inputs s^1 ... s^t."""
    V = zero_state(WARPS_J, UNROLL_J, BLOCK_B, BLOCK_D, ACC)
    for _ in range(t):
        s = load_state(s_ptr, i_b, i_j, B, J, D, WARPS_J, UNROLL_J, BLOCK_D, ACC)
        V = plus(V, squashed(s, UNROLL_J), UNROLL_J)
        s_ptr += size
    return V


@triton.jit
def for_every_warp(x, WARPS_I: tl.constexpr, WARPS_J: tl.constexpr):
    """[WARPS_J, M, N] to [WARPS, M, N]."""
    M: tl.constexpr = x.shape[1]
    N: tl.constexpr = x.shape[2]
    x = tl.broadcast_to(x[None, :, :, :], [WARPS_I, WARPS_J, M, N])
    return tl.reshape(x, [WARPS_I * WARPS_J, M, N])


@triton.jit
def sum_over_inputs(x, WARPS_I: tl.constexpr, WARPS_J: tl.constexpr):
    """[WARPS, M, N] to [WARPS_J, M, N]."""
    M: tl.constexpr = x.shape[1]
    N: tl.constexpr = x.shape[2]
    return tl.sum(tl.reshape(x, [WARPS_I, WARPS_J, M, N]), axis=0)


@triton.jit
def state_for_every_warp(
    x, WARPS_I: tl.constexpr, WARPS_J: tl.constexpr, UNROLL_J: tl.constexpr
):  # fmt: skip
    new = ()
    for index in tl.static_range(UNROLL_J):
        new += (for_every_warp(x[index], WARPS_I, WARPS_J),)
    return new


@triton.jit
def state_over_inputs(
    x, WARPS_I: tl.constexpr, WARPS_J: tl.constexpr, UNROLL_J: tl.constexpr
):  # fmt: skip
    new = ()
    for index in tl.static_range(UNROLL_J):
        new += (sum_over_inputs(x[index], WARPS_I, WARPS_J),)
    return new


@triton.jit
def copied_cells(ROWS: tl.constexpr, STEP_I: tl.constexpr, BLOCK_K: tl.constexpr):
    """The (row, i, k) of a tile [ROWS, N] in the order in which it lies in shared memory,
    [1, ROWS N] each.

    Threads copy 16 bytes each, in that order, too. All k of a capsule come first, so that eight
    threads, which ask for memory together, ask for whole sectors of 32 bytes; then the capsules of
    a step, so that what threads read at the same time lies in few banks.
    """
    x = tl.arange(0, ROWS * STEP_I * BLOCK_K)[None, :]
    y = x // BLOCK_K
    z = y // 2
    return z // STEP_I * 2 + y % 2, z % STEP_I, x % BLOCK_K


@triton.jit
def tile_of_cells(x, ROWS: tl.constexpr, STEP_I: tl.constexpr, BLOCK_K: tl.constexpr):
    """What was loaded as copied_cells() says, [W, ROWS N], as [W, ROWS, N]."""
    x = tl.reshape(x, [x.shape[0], ROWS // 2, STEP_I, 2, BLOCK_K // 2, 2])
    x = tl.permute(x, (0, 1, 3, 4, 2, 5))
    return tl.reshape(x, [x.shape[0], ROWS, STEP_I * BLOCK_K])


@triton.jit
def input_capsules(
    u_ptr, b_first, start, B, I, K: tl.constexpr, WINDOW: tl.constexpr, WARPS_I: tl.constexpr,
    WARPS_J: tl.constexpr, STEP_I: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The input capsules of every warp, [WARPS, BLOCK_B, N]; 0 from I on."""
    N: tl.constexpr = STEP_I * BLOCK_K
    b, i, k = copied_cells(BLOCK_B, STEP_I, BLOCK_K)
    b = b_first + b
    i += (tl.arange(0, WARPS_I) * STEP_I)[:, None]
    if WINDOW is None:  # what changes from step to step into the pointer, as in weights()
        u_ptr += start * K
        columns = capsule_offset(i, K, WINDOW)
    else:
        columns = capsule_offset(start + i, K, WINDOW)
    offsets = sample_offset(b, I, K, WINDOW) + k + columns
    mask = (b < B) & (start + i < I) & (k < K)
    u = tl.load(u_ptr + offsets, mask=mask, other=0.0).to(ACC)
    u = tl.expand_dims(tile_of_cells(u, BLOCK_B, STEP_I, BLOCK_K), 1)
    u = tl.broadcast_to(u, [WARPS_I, WARPS_J, BLOCK_B, N])
    return tl.reshape(u, [WARPS_I * WARPS_J, BLOCK_B, N])


@triton.jit
def weights(
    weight_ptr, start, i_j, I, WEIGHT_SHARING: tl.constexpr, J: tl.constexpr, K: tl.constexpr,
    D: tl.constexpr, WARPS_I: tl.constexpr, WARPS_J: tl.constexpr, STEP_I: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """W of the capsules of every warp, [WARPS, BLOCK_D, N]; 0 from I on.

    What changes from step to step and from tile to tile goes into the pointer, so that all of them
    share one set of offsets. 16-bit weights are copied in the order of the columns: for these
    Triton has an order of its own in shared memory, without conflicts of banks.
    """
    PAIRED: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth == 16
    w = tl.arange(0, WARPS_I * WARPS_J)[:, None]
    if PAIRED:
        w = w[:, :, None]
        d = tl.arange(0, BLOCK_D)[:, None]
        n = tl.arange(0, STEP_I * BLOCK_K)
        i, k = n // 2 % STEP_I, n // (2 * STEP_I) * 2 + n % 2
    else:
        d, i, k = copied_cells(BLOCK_D, STEP_I, BLOCK_K)
    i += w // WARPS_J * STEP_I
    j = w % WARPS_J
    first = start // WEIGHT_SHARING
    rows = (start + i) // WEIGHT_SHARING - first
    W = tl.load(
        weight_ptr + (first * J + i_j) * (D * K) + (rows * (J * D * K) + (j * (D * K) + d * K + k)),
        mask=(i_j + j < J) & (start + i < I) & (k < K) & (d < D),
        other=0.0,
    ).to(ACC)
    return W if PAIRED else tile_of_cells(W, BLOCK_D, STEP_I, BLOCK_K)


@triton.jit
def step_inputs(
    u_ptr, weight_ptr, b_first, start, i_j, B, I, WEIGHT_SHARING: tl.constexpr, J: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, WARPS_I: tl.constexpr,
    WARPS_J: tl.constexpr, UNROLL_J: tl.constexpr, STEP_I: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """u of a step, and W as a tuple of UNROLL_J tiles."""
    u = input_capsules(
        u_ptr, b_first, start, B, I, K, WINDOW, WARPS_I, WARPS_J, STEP_I, BLOCK_B, BLOCK_K, ACC
    )
    W = ()
    for n in tl.static_range(UNROLL_J):
        W += (weights(
            weight_ptr, start, i_j + n * WARPS_J, I, WEIGHT_SHARING, J, K, D,
            WARPS_I, WARPS_J, STEP_I, BLOCK_D, BLOCK_K, ACC,
        ),)  # fmt: skip
    return u, W


@triton.jit
def logits_of_priors(
    logits_ptr, start, i_j, I, J: tl.constexpr,
    WARPS_I: tl.constexpr, WARPS_J: tl.constexpr, STEP_I: tl.constexpr, BLOCK_B: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Log priors, [WARPS_I * WARPS_J, BLOCK_B, STEP_I]; -inf beyond J, so that c = 0 there."""
    w = tl.arange(0, WARPS_I * WARPS_J)
    j = (i_j + w % WARPS_J)[:, None, None]
    prior = tl.where(j < J, 0.0, float("-inf")).to(ACC)
    if logits_ptr is not None:
        i = start + (w // WARPS_J * STEP_I)[:, None, None] + tl.arange(0, STEP_I)[None, None, :]
        prior += tl.load(logits_ptr + i * J + j, mask=(i < I) & (j < J), other=0.0).to(ACC)
    return tl.broadcast_to(prior, [WARPS_I * WARPS_J, BLOCK_B, STEP_I])


@triton.jit
def columns_apart(x, STEP_I: tl.constexpr):
    """[WARPS, M, N] as [WARPS, M, BLOCK_K // 2, STEP_I, 2]."""
    return tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // (2 * STEP_I), STEP_I, 2])


@triton.jit
def operand_order(x, STEP_I: tl.constexpr, PAIRED: tl.constexpr):
    """Columns (k // 2, i, k % 2) in the order (k, i); PAIRED, as they are."""
    if not PAIRED:
        x = tl.reshape(tl.permute(columns_apart(x, STEP_I), (0, 1, 2, 4, 3)), x.shape)
    return x


@triton.jit
def agreement_with(
    x, u, W, STEP_I: tl.constexpr, TILED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """u_hat . x as u . (x W), [WARPS, BLOCK_B, STEP_I].

    Which of two products is fused with their sum is the compiler's choice, and not the same in
    every kernel. Where J is TILED, two kernels must get the same bits, and it is said here.
    """
    xW = product(x, W, ACC, PRECISION)
    if TILED:
        xW_even, xW_odd = tl.split(columns_apart(xW, STEP_I))
        u_even, u_odd = tl.split(columns_apart(u, STEP_I))
        xWu = tl.fma(xW_even, u_even, xW_odd * u_odd)
    else:
        xWu = tl.sum(columns_apart(xW * u, STEP_I), axis=4)
    return tl.sum(xWu, axis=2)


@triton.jit
def logits_of_step(
    logits_ptr, V, u, W, start, i_j, I, J: tl.constexpr,
    WARPS_I: tl.constexpr, WARPS_J: tl.constexpr, UNROLL_J: tl.constexpr, STEP_I: tl.constexpr,
    BLOCK_B: tl.constexpr, TILED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Priors plus u_hat . V, UNROLL_J tiles [WARPS, BLOCK_B, STEP_I]; without V it is 0."""
    b = ()
    for n in tl.static_range(UNROLL_J):
        b_n = logits_of_priors(
            logits_ptr, start, i_j + n * WARPS_J, I, J, WARPS_I, WARPS_J, STEP_I, BLOCK_B, ACC
        )
        if V is not None:
            b_n += agreement_with(V[n], u, W[n], STEP_I, TILED, ACC, PRECISION)
        b += (b_n,)
    return b


@triton.jit
def weighted_sum(
    y, u, W, STEP_I: tl.constexpr, PAIRED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """sum_i y_i u_hat_i over STEP_I capsules as (y u) W^T, [WARPS, BLOCK_B, BLOCK_D].

    y is doubled and the sum halved: exact, and free where the sum is added to another. Without it
    the compiler would leave that sum, too, to the matrix unit, which rounds towards zero.
    """
    yu = tl.reshape(columns_apart(u, STEP_I) * (2 * y)[:, :, None, :, None], u.shape)
    W = tl.permute(operand_order(W, STEP_I, PAIRED), (0, 2, 1))
    return 0.5 * product(operand_order(yu, STEP_I, PAIRED), W, ACC, PRECISION)


@triton.jit
def lanes_together(x):
    """[W, M, N] as [W, M N], with what neighbouring threads hold side by side.

    A matrix instruction leaves N // 4 neighbouring columns with a thread, and the next with the
    next: they come last, so that warps which exchange x write to different banks.
    """
    PAIR: tl.constexpr = max(1, x.shape[2] // 4)
    x = tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // PAIR, PAIR])
    x = tl.permute(x, (0, 3, 1, 2))
    return tl.reshape(x, [x.shape[0], PAIR * x.shape[2] * x.shape[3]])


@triton.jit
def lanes_apart(x, M: tl.constexpr, N: tl.constexpr):
    """The inverse of lanes_together."""
    PAIR: tl.constexpr = max(1, N // 4)
    x = tl.reshape(x, [x.shape[0], PAIR, M, N // PAIR])
    return tl.reshape(tl.permute(x, (0, 2, 3, 1)), [x.shape[0], M, N])


@triton.jit
def over_warps(x, MAXIMUM: tl.constexpr, WARPS_I: tl.constexpr, WARPS_J: tl.constexpr):
    """The maximum or sum over WARPS_J of [WARPS, M, N], for every warp."""
    if WARPS_J > 1:
        M: tl.constexpr = x.shape[1]
        N: tl.constexpr = x.shape[2]
        y = tl.reshape(lanes_together(x), [WARPS_I, WARPS_J, M * N])
        y = tl.max(y, axis=1, keep_dims=True) if MAXIMUM else tl.sum(y, axis=1, keep_dims=True)
        y = tl.broadcast_to(y, [WARPS_I, WARPS_J, M * N])
        x = lanes_apart(tl.reshape(y, [WARPS_I * WARPS_J, M * N]), M, N)
    return x


@triton.jit
def statistics_tile(
    start, i_b, B, I, WARPS_I: tl.constexpr, WARPS_J: tl.constexpr, STEP_I: tl.constexpr
):
    """Offsets and mask of every warp's capsules in the tabled statistics [3, B, I],
    [WARPS, BLOCK_B, STEP_I], and how far one statistic lies from the next."""
    w = tl.arange(0, WARPS_I * WARPS_J)
    i = start + (w // WARPS_J * STEP_I)[:, None, None] + tl.arange(0, STEP_I)[None, None, :]
    i_b = i_b[None, :, None]
    return i_b * I + i, (i_b < B) & (i < I), as_offset(B, i_b.dtype) * I


@triton.jit
def softmax_parts(
    b, p_statistics, mask, plane, LEAKY: tl.constexpr, WARPS_I: tl.constexpr,
    WARPS_J: tl.constexpr, UNROLL_J: tl.constexpr,
):  # fmt: skip
    """e and 1 / total of logits b, so that c = e / total; from tabled statistics if given."""
    if p_statistics is None:
        maximum = b[0]
        for index in tl.static_range(1, UNROLL_J):
            maximum = tl.maximum(maximum, b[index])
        maximum = over_warps(maximum, True, WARPS_I, WARPS_J)
        if LEAKY:  # one more logit, 0
            maximum = tl.maximum(maximum, 0.0)
    else:
        maximum = tl.load(p_statistics, mask=mask, other=0.0)
    e = ()
    for index in tl.static_range(UNROLL_J):
        e += (tl.exp(b[index] - maximum),)
    if p_statistics is None:
        total = e[0]
        for index in tl.static_range(1, UNROLL_J):
            total += e[index]
        total = over_warps(total, False, WARPS_I, WARPS_J)
        if LEAKY:
            total += tl.exp(-maximum)
    else:
        total = tl.load(p_statistics + plane, mask=mask, other=1.0)
    return e, 1 / total


@triton.jit
def mean_gradient(
    e, dc, inverse, p_statistics, mask, plane, WARPS_I: tl.constexpr, WARPS_J: tl.constexpr,
    UNROLL_J: tl.constexpr,
):  # fmt: skip
    """sum_j c_j dc_j; tabled if given."""
    if p_statistics is None:
        mean = e[0] * dc[0]
        for index in tl.static_range(1, UNROLL_J):
            mean += e[index] * dc[index]
        mean = over_warps(mean, False, WARPS_I, WARPS_J) * inverse
    else:
        mean = tl.load(p_statistics + 2 * plane, mask=mask, other=0.0)
    return mean
