"""Kernels for capsules whose weights are too large for one tile: blocks of d and of k.

Simple rather than fast. What couples the blocks is small and tabled: the coupling c and the
gradient dl of the logits, [B, I, J] an iteration. u_hat exists in blocks [BLOCK_B, BLOCK_D] only.
"""

import triton
import triton.language as tl

from .blocks import as_offset, product, squash, squash_vjp, tiles_of_program
from .windows import capsule_offset, sample_offset


@triton.jit
def plus_product(x, a, b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """x + a b, where the matrix unit, which rounds towards zero, does not add x."""
    return x + 0.5 * product(2 * a, b, ACC, PRECISION)


@triton.jit
def indices(start, BLOCK: tl.constexpr, OFFSET: tl.constexpr):
    return as_offset(start, OFFSET) + tl.arange(0, BLOCK)


@triton.jit
def block(
    x_ptr, row, row_size: tl.constexpr, rows, i_column, columns: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """A block [row, i_column] of a matrix whose rows are ``row_size`` elements apart; 0 outside."""
    mask = (row < rows)[:, None] & (i_column < columns)[None, :]
    return tl.load(x_ptr + row[:, None] * row_size + i_column[None, :], mask=mask, other=0.0).to(
        ACC
    )


@triton.jit
def inputs(u_ptr, i_b, i, i_k, B, I, K: tl.constexpr, WINDOW: tl.constexpr, ACC: tl.constexpr):
    """A block of input capsule i, [BLOCK_B, BLOCK_K]."""
    offsets = sample_offset(i_b, I, K, WINDOW)[:, None] + i_k[None, :]
    mask = (i_b < B)[:, None] & (i_k < K)[None, :]
    return tl.load(u_ptr + capsule_offset(i, K, WINDOW) + offsets, mask=mask, other=0.0).to(ACC)


@triton.jit
def predictions(
    u_ptr, weight_ptr, i_b, i, i_d, B, I, K: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_K: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of u_hat, [BLOCK_B, BLOCK_D]; ``weight_ptr`` points to W_ij."""
    u_hat = tl.zeros([i_b.shape[0], i_d.shape[0]], ACC)
    for k in range(0, K, BLOCK_K):
        i_k = indices(k, BLOCK_K, i_b.dtype)
        u = inputs(u_ptr, i_b, i, i_k, B, I, K, WINDOW, ACC)
        W = block(weight_ptr, i_d, K, D, i_k, K, ACC)
        u_hat = plus_product(u_hat, u, tl.trans(W), ACC, PRECISION)
    return u_hat


@triton.jit
def prediction_gradients(
    c_ptr, dl_ptr, V_ptr, ds_ptr, i_b, i, j, i_d, first, iterations, B, I,
    J: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A block of du_hat = sum_t (c^t ds^t + dl^t V^(t-1)), [BLOCK_B, BLOCK_D]."""
    du_hat = tl.zeros([i_b.shape[0], i_d.shape[0]], ACC)
    table = as_offset(B, i_b.dtype) * I * J
    state = as_offset(B, i_b.dtype) * J * D
    o_table = (i_b * I + i) * J + j
    for t in range(first, iterations + 1):
        c = tl.load(c_ptr + (t - 1) * table + o_table, mask=i_b < B, other=0.0)
        du_hat += c[:, None] * block(ds_ptr + (t - 1) * state + j * D, i_b, J * D, B, i_d, D, ACC)
        if dl_ptr is not None and t > 1:  # V^0 = 0
            dl = tl.load(dl_ptr + (t - 1) * table + o_table, mask=i_b < B, other=0.0)
            V = block(V_ptr + (t - 1) * state + j * D, i_b, J * D, B, i_d, D, ACC)
            du_hat += dl[:, None] * V
    return du_hat


@triton.jit
def wide_coupling_kernel(
    u_ptr,  # [B, I, K], or a grid (windows.py)
    weight_ptr,  # [I // WEIGHT_SHARING, J, D, K]
    logits_ptr,  # [I, J] or None
    V_ptr,  # [B, J, D]: V^(t-1); None for t = 1, where it is 0
    ds_ptr,  # [B, J, D]: ds^t, or None
    c_ptr,  # [B, I, J]: c^t, written
    dl_ptr,  # [B, I, J]: dl^t, written if ds is given
    coupling_ptr,  # [B, I, J] or None: c^t in the dtype of u, written
    B,
    I,
    J: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    WEIGHT_SHARING: tl.constexpr,
    WINDOW: tl.constexpr,
    LEAKY: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    OFFSET: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """c^t and dl^t of an input capsule and a batch tile. Grid: (input capsules x batch tiles,).

    A first pass over J leaves logits and dc in the tables, a second makes c and dl of them.
    """
    b_first, tile = tiles_of_program(B, BLOCK_B, True, OFFSET)
    i_b = b_first + tl.arange(0, BLOCK_B)
    i = as_offset(tile, OFFSET)
    m_b = i_b < B
    o_table = (i_b * I + i) * J
    # The leaky softmax starts with its own logit, 0.
    maximum = tl.full([BLOCK_B], 0.0 if LEAKY else float("-inf"), ACC)
    total = tl.full([BLOCK_B], 1.0 if LEAKY else 0.0, ACC)
    mean = tl.zeros([BLOCK_B], ACC)
    for index in range(J):
        j = as_offset(index, OFFSET)
        b = tl.zeros([BLOCK_B], ACC)
        dc = tl.zeros([BLOCK_B], ACC)
        if logits_ptr is not None:
            b += tl.load(logits_ptr + i * J + j).to(ACC)
        if (V_ptr is not None) or (ds_ptr is not None):
            p_weight = weight_ptr + (i // WEIGHT_SHARING * J + j) * (D * K)
            for d in range(0, D, BLOCK_D):
                i_d = indices(d, BLOCK_D, OFFSET)
                u_hat = predictions(
                    u_ptr, p_weight, i_b, i, i_d, B, I, K, D, WINDOW, BLOCK_K, ACC, PRECISION
                )
                if V_ptr is not None:
                    V = block(V_ptr + j * D, i_b, J * D, B, i_d, D, ACC)
                    b += tl.sum(u_hat * V, axis=1)
                if ds_ptr is not None:
                    ds = block(ds_ptr + j * D, i_b, J * D, B, i_d, D, ACC)
                    dc += tl.sum(u_hat * ds, axis=1)
        new = tl.maximum(maximum, b)
        finite = tl.where(new == float("-inf"), 0.0, new)  # all logits -inf so far
        rescale = tl.exp(maximum - finite)
        e = tl.exp(b - finite)
        total = total * rescale + e
        mean = mean * rescale + e * dc
        maximum = new
        tl.store(c_ptr + o_table + j, b, mask=m_b)
        if ds_ptr is not None:
            tl.store(dl_ptr + o_table + j, dc, mask=m_b)
    inverse = 1 / total
    mean *= inverse
    tl.debug_barrier()  # other threads may read what was stored
    for j in range(J):
        b = tl.load(c_ptr + o_table + j, mask=m_b, other=0.0)
        c = tl.exp(b - maximum) * inverse
        if ds_ptr is not None:
            dc = tl.load(dl_ptr + o_table + j, mask=m_b, other=0.0)
        tl.debug_barrier()
        tl.store(c_ptr + o_table + j, c, mask=m_b)
        if ds_ptr is not None:
            tl.store(dl_ptr + o_table + j, c * (dc - mean), mask=m_b)
        if coupling_ptr is not None:
            p_coupling = coupling_ptr + o_table + j
            tl.store(p_coupling, c.to(coupling_ptr.dtype.element_ty), mask=m_b)


@triton.jit
def wide_sum_kernel(
    u_ptr,  # [B, I, K], or a grid (windows.py)
    weight_ptr,  # [I // WEIGHT_SHARING, J, D, K]
    y_ptr,  # [B, I, J]
    bias_ptr,  # [J, D] or None: added
    before_ptr,  # [B, J, D] or None: added
    sum_ptr,  # [B, J, D]: sum_i y_ij u_hat_ij, written
    B,
    I,
    J: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    WEIGHT_SHARING: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    OFFSET: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """s^t of c^t, G^(t-1) of dl^t. Grid: (output capsules x blocks of d x batch tiles,)."""
    tiles_D: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    b_first, tile = tiles_of_program(B, BLOCK_B, True, OFFSET)
    i_b = b_first + tl.arange(0, BLOCK_B)
    i_d = indices(tile % tiles_D * BLOCK_D, BLOCK_D, OFFSET)
    j = as_offset(tile // tiles_D, OFFSET)
    total = tl.zeros([BLOCK_B, BLOCK_D], ACC)
    for index in range(I):
        i = as_offset(index, OFFSET)
        y = tl.load(y_ptr + (i_b * I + i) * J + j, mask=i_b < B, other=0.0)[:, None]
        p_weight = weight_ptr + (i // WEIGHT_SHARING * J + j) * (D * K)
        for k in range(0, K, BLOCK_K):
            i_k = indices(k, BLOCK_K, OFFSET)
            u = inputs(u_ptr, i_b, i, i_k, B, I, K, WINDOW, ACC)
            W = block(p_weight, i_d, K, D, i_k, K, ACC)
            total = plus_product(total, y * u, tl.trans(W), ACC, PRECISION)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + j * D + i_d, mask=i_d < D, other=0.0).to(ACC)[None, :]
    if before_ptr is not None:
        total += block(before_ptr + j * D, i_b, J * D, B, i_d, D, ACC)
    mask = (i_b < B)[:, None] & (i_d < D)[None, :]
    tl.store(sum_ptr + i_b[:, None] * (J * D) + j * D + i_d[None, :], total, mask=mask)


@triton.jit
def wide_state_kernel(
    s_ptr,  # [B, J, D]: s^t
    V_before_ptr,  # [B, J, D]: V^(t-1); None where it is 0
    V_ptr,  # [B, J, D] or None: V^t, written
    v_ptr,  # [B, J, D] or None: v^t in the dtype of u, written
    G_ptr,  # [B, J, D] or None: dL/dv^t
    ds_ptr,  # [B, J, D]: ds^t, written if G is given
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """squash and its derivative, a whole capsule at a time. Grid: (samples x output capsules,)."""
    d = tl.arange(0, BLOCK_D)[None, None, :]
    offsets = as_offset(tl.program_id(0), OFFSET) * D + d
    mask = d < D
    s = tl.load(s_ptr + offsets, mask=mask, other=0.0)
    if (V_ptr is not None) or (v_ptr is not None):
        v = squash(s)
        if v_ptr is not None:
            tl.store(v_ptr + offsets, v.to(v_ptr.dtype.element_ty), mask=mask)
        if V_ptr is not None:
            if V_before_ptr is not None:
                v += tl.load(V_before_ptr + offsets, mask=mask, other=0.0)
            tl.store(V_ptr + offsets, v, mask=mask)
    if G_ptr is not None:
        G = tl.load(G_ptr + offsets, mask=mask, other=0.0).to(ACC)
        tl.store(ds_ptr + offsets, squash_vjp(s, G), mask=mask)


@triton.jit
def wide_input_gradient_kernel(
    weight_ptr,  # [I // WEIGHT_SHARING, J, D, K]
    c_ptr,  # [R, B, I, J]
    dl_ptr,  # [R, B, I, J], or None with routing_gradient="last"
    V_ptr,  # [R, B, J, D]: V^(t-1)
    ds_ptr,  # [R, B, J, D]
    grad_u_ptr,  # [B, I, K], written
    B,
    I,
    first,  # the first iteration that is differentiated
    iterations,  # R
    J: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    WEIGHT_SHARING: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    OFFSET: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """du_i = sum_j W_ij^T du_hat_ij. Grid: (input capsules x blocks of k x batch tiles,)."""
    tiles_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    b_first, tile = tiles_of_program(B, BLOCK_B, True, OFFSET)
    i_b = b_first + tl.arange(0, BLOCK_B)
    i_k = indices(tile % tiles_K * BLOCK_K, BLOCK_K, OFFSET)
    i = as_offset(tile // tiles_K, OFFSET)
    du = tl.zeros([BLOCK_B, BLOCK_K], ACC)
    for index in range(J):
        j = as_offset(index, OFFSET)
        p_weight = weight_ptr + (i // WEIGHT_SHARING * J + j) * (D * K)
        for d in range(0, D, BLOCK_D):
            i_d = indices(d, BLOCK_D, OFFSET)
            du_hat = prediction_gradients(
                c_ptr, dl_ptr, V_ptr, ds_ptr, i_b, i, j, i_d, first, iterations, B, I, J, D, ACC
            )
            W = block(p_weight, i_d, K, D, i_k, K, ACC)
            du = plus_product(du, du_hat, W, ACC, PRECISION)
    mask = (i_b < B)[:, None] & (i_k < K)[None, :]
    p_u = grad_u_ptr + (i_b * I + i)[:, None] * K + i_k[None, :]
    tl.store(p_u, du.to(grad_u_ptr.dtype.element_ty), mask=mask)


@triton.jit
def wide_weight_gradient_kernel(
    u_ptr,  # [B, I, K], or a grid (windows.py)
    c_ptr,  # [R, B, I, J]
    dl_ptr,  # [R, B, I, J], or None with routing_gradient="last"
    V_ptr,  # [R, B, J, D]: V^(t-1)
    ds_ptr,  # [R, B, J, D]
    grad_weight_ptr,  # [I // WEIGHT_SHARING, J, D, K], written
    B,
    I,
    first,  # the first iteration that is differentiated
    iterations,  # R
    J: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    WEIGHT_SHARING: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    OFFSET: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dW_ij = sum_b du_hat_ij u_i^T. Grid: (rows of the weights x J x blocks of d x of k,)."""
    tiles_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tiles_D: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    i_k = indices(tl.program_id(0) % tiles_K * BLOCK_K, BLOCK_K, OFFSET)
    i_d = indices(tl.program_id(0) // tiles_K % tiles_D * BLOCK_D, BLOCK_D, OFFSET)
    j = as_offset(tl.program_id(0) // (tiles_K * tiles_D) % J, OFFSET)
    row = as_offset(tl.program_id(0) // (tiles_K * tiles_D * J), OFFSET)
    dW = tl.zeros([BLOCK_D, BLOCK_K], ACC)
    for i in range(row * WEIGHT_SHARING, (row + 1) * WEIGHT_SHARING):
        for b in range(0, B, BLOCK_B):
            i_b = indices(b, BLOCK_B, OFFSET)
            du_hat = prediction_gradients(
                c_ptr, dl_ptr, V_ptr, ds_ptr, i_b, i, j, i_d, first, iterations, B, I, J, D, ACC
            )
            u = inputs(u_ptr, i_b, i, i_k, B, I, K, WINDOW, ACC)
            dW = plus_product(dW, tl.trans(du_hat), u, ACC, PRECISION)
    mask = (i_d < D)[:, None] & (i_k < K)[None, :]
    p_weight = grad_weight_ptr + (row * J + j) * (D * K) + i_d[:, None] * K + i_k[None, :]
    tl.store(p_weight, dW.to(grad_weight_ptr.dtype.element_ty), mask=mask)
