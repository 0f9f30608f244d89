"""Convolutional capsules: a kernel of transformation matrices, routed at every position."""

from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from .api import cast_as_products, route, under_autocast
from .autograd import Options
from .dispatch import select_backend
from .validation import (
    check_beside_u,
    check_like_u,
    check_not_empty,
    check_options,
    check_pair,
    check_tensor,
)
from .windows import places


@overload
def fused_routing_conv(
    u: Tensor,
    weight: Tensor,
    num_iterations: int = 3,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    logits: Tensor | None = None,
    bias: Tensor | None = None,
    leaky: bool = False,
    routing_gradient: str = "full",
    return_coupling: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def fused_routing_conv(
    u: Tensor,
    weight: Tensor,
    num_iterations: int = 3,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    logits: Tensor | None = None,
    bias: Tensor | None = None,
    leaky: bool = False,
    routing_gradient: str = "full",
    return_coupling: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


@overload
def fused_routing_conv(
    u: Tensor,
    weight: Tensor,
    num_iterations: int = 3,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    logits: Tensor | None = None,
    bias: Tensor | None = None,
    leaky: bool = False,
    routing_gradient: str = "full",
    return_coupling: bool,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...


def fused_routing_conv(
    u: Tensor,
    weight: Tensor,
    num_iterations: int = 3,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    logits: Tensor | None = None,
    bias: Tensor | None = None,
    leaky: bool = False,
    routing_gradient: str = "full",
    return_coupling: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Dynamic routing inside a window that slides over a grid of capsules, with one kernel.

    The output capsules of a position are routed from the capsules in its window, each of which
    votes through the matrix of its type and its place in the window: :func:`fused_routing` with
    I = C kh kw input capsules, at each of the H' W' positions of each sample. Beyond the edges
    capsules are zero: they vote for nothing.

    Args:
        u: capsules of C types on a grid, [B, C, K, H, W]; float64, float32, bfloat16 or float16,
            any strides. B may be 0.
        weight: transformation matrices, [C, kh, kw, J, D, K]. Like logits and bias it has the dtype
            and the device of u.
        num_iterations: routing iterations R >= 1.
        stride: of the window; one number for both directions, or (rows, columns).
        padding: capsules of zeros around the grid, on either side; one number or two likewise.
        logits: log priors that a capsule of type c, at its place in the window, couples to j,
            [C, kh, kw, J]; zeros if None.
        bias: added to s in every iteration, [J, D]; zeros if None.
        leaky, routing_gradient, backend: as in :func:`fused_routing`.
        return_coupling: also return c of the last iteration, [B, C, kh, kw, J, H', W'], in the
            dtype of u and not differentiable.

    Returns:
        Output capsules v, [B, J, D, H', W'], in the dtype of u, with H' = (H + 2 padding - kh) //
        stride + 1 and W' likewise; with ``return_coupling`` the pair (v, c). In memory v lies as it
        is made, [B, H', W', J, D].

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for can't be used; the message says why.

    Example::

        u = torch.randn(16, 8, 4, 12, 12)  # 8 types of capsules of dimension 4, on 12 x 12
        weight = 0.1 * torch.randn(8, 3, 3, 6, 5, 4)
        v = fused_routing_conv(u, weight, stride=2)  # [16, 6, 5, 5, 5]

    Precision and derivatives: as :func:`fused_routing` has them.

    Memory: neither predictions nor windows are kept for the backward. "cpu" and "triton" do not
    even make the windows, but read capsules where they lie in the grid. They copy u first if it is
    padded or if its capsules, [C, K], do not lie last in memory; those of another layer's output
    do. The backward of "triton" holds the gradients of all windows, [B H' W', C kh kw, K], in
    float32 or wider until they are added up. "cuda" and "reference" copy the windows while they
    run: kh kw / stride^2 times u.
    """
    caller = "fused_routing_conv"
    if autocast := under_autocast(u):
        u, weight, logits, bias = cast_as_products(u, weight, logits, bias)
    check_options(num_iterations, leaky, routing_gradient, caller, return_coupling=return_coupling)
    down, right = check_pair("stride", stride, caller)
    pad_rows, pad_columns = check_pair("padding", padding, caller, least=0)
    check_tensor("u", u, "[B, C, K, H, W]", 5, caller)
    check_tensor("weight", weight, "[C, kh, kw, J, D, K]", 6, caller)
    B, C, K, H, W = u.shape
    types, kh, kw, J, D, weight_K = weight.shape
    if torch.jit.is_tracing():  # a size is a tensor there, which the list of a window can't hold
        kh, kw = int(kh), int(kw)
    if types != C or weight_K != K:
        raise ValueError(
            f"{caller}: weight must have shape [C, kh, kw, J, D, K] = [{C}, kh, kw, J, D, {K}], "
            f"got {list(weight.shape)}"
        )
    check_not_empty("u", u, caller, C=C, K=K)
    check_not_empty("weight", weight, caller, kh=kh, kw=kw, J=J, D=D)
    if kh > H + 2 * pad_rows or kw > W + 2 * pad_columns:
        raise ValueError(
            f"{caller}: the window of weight, {kh} x {kw}, must fit into the grid of u, "
            f"{H} x {W} with padding {padding}"
        )
    check_like_u("weight", weight, u, caller)
    if logits is not None:
        check_beside_u("logits", logits, "[C, kh, kw, J]", (C, kh, kw, J), u, caller)
        logits = logits.flatten(0, 2)
    if bias is not None:
        check_beside_u("bias", bias, "[J, D]", (J, D), u, caller)
    weight = weight.flatten(0, 2)
    backend = select_backend(caller, backend, u, weight, num_iterations, 1)
    grid = u.permute(0, 3, 4, 1, 2)  # [B, H, W, C, K]
    if pad_rows or pad_columns:
        grid = F.pad(grid, (0, 0, 0, 0, pad_columns, pad_columns, pad_rows, pad_rows))
    window = (kh, kw, down, right)
    options = Options(backend, num_iterations, leaky, 1, routing_gradient, return_coupling, window)
    v, coupling = route(caller, grid, weight, logits, bias, options, autocast)
    rows, columns = places(grid, window)
    v = v.unflatten(0, (B, rows, columns)).permute(0, 3, 4, 1, 2)
    if not return_coupling:
        return v
    coupling = coupling.unflatten(0, (B, rows, columns)).unflatten(3, (C, kh, kw))
    return v, coupling.permute(0, 3, 4, 5, 6, 1, 2)
