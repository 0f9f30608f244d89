"""Convolutional capsules: a kernel of transformation matrices, routed at every position."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .api import fused_routing
from .dispatch import CHOICES
from .validation import ROUTING_GRADIENTS, check_bool, check_choice, check_int, check_tensor


def fused_routing_conv(
    u: Tensor,
    weight: Tensor,
    num_iterations: int = 3,
    *,
    stride: int = 1,
    padding: int = 0,
    bias: Tensor | None = None,
    leaky: bool = False,
    routing_gradient: str = "full",
    backend: str = "auto",
) -> Tensor:
    """Dynamic routing inside a window that slides over a grid of capsules, with one kernel.

    The output capsules of a position are routed from the capsules in its window, each of which
    votes through the matrix of its type and its place in the window: :func:`fused_routing` with
    I = C kh kw, for each of the B H' W' positions. Beyond the edges capsules are zero: they vote
    for nothing.

    The predictions are never stored. The windows are: [B H' W', C kh kw, K], about
    kh kw / stride^2 times the memory of u, which the backward keeps.

    Args:
        u: capsules of C types on a grid, [B, C, K, H, W]; B may be 0.
        weight: transformation matrices, [C, kh, kw, J, D, K], dtype and device of u.
        num_iterations: routing iterations R >= 1.
        stride: of the window, in both directions.
        padding: capsules of zeros around the grid, on every side.
        bias: added to s in every iteration, [J, D].
        leaky, routing_gradient, backend: as in :func:`fused_routing`.

    Returns:
        Output capsules v, [B, J, D, H', W'], H' = (H + 2 padding - kh) // stride + 1, in the
        dtype of u. Contiguous in the order [B, H', W', J, D], the one in which they are made.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for can't be used; the message says why.
    """
    caller = "fused_routing_conv"
    check_tensor("u", u, "[B, C, K, H, W]", 5, caller)
    check_tensor("weight", weight, "[C, kh, kw, J, D, K]", 6, caller)
    check_int("stride", stride, caller)
    check_padding(padding, caller)
    B, C, K, H, W = u.shape
    kh, kw = weight.shape[1:3]
    if weight.shape[0] != C or weight.shape[5] != K:
        raise ValueError(
            f"{caller}: weight must have shape [C, kh, kw, J, D, K] = [{C}, kh, kw, J, D, {K}], "
            f"got {list(weight.shape)}"
        )
    if min(kh, kw) < 1 or kh > H + 2 * padding or kw > W + 2 * padding:
        raise ValueError(
            f"{caller}: the window of weight, {kh} x {kw}, must have at least one capsule and fit "
            f"into the grid of u, {H} x {W} with padding {padding}"
        )
    padded = F.pad(u, [padding] * 4) if padding else u
    windows = padded.unfold(3, kh, stride).unfold(4, kw, stride)  # [B, C, K, H', W', kh, kw]
    rows, columns = windows.shape[3:5]
    windows = windows.permute(0, 3, 4, 1, 5, 6, 2)  # [B, H', W', C, kh, kw, K]
    v = fused_routing(
        windows.flatten(0, 2).flatten(1, 3),
        weight.flatten(0, 2),
        num_iterations,
        bias=bias,
        leaky=leaky,
        routing_gradient=routing_gradient,
        backend=backend,
    )
    return v.unflatten(0, (B, rows, columns)).permute(0, 3, 4, 1, 2)


def check_padding(padding: object, caller: str) -> None:
    if isinstance(padding, bool) or not isinstance(padding, int):
        raise TypeError(
            f"{caller}: padding must be an int >= 0, got {type(padding).__name__} {padding!r}"
        )
    if padding < 0:
        raise ValueError(f"{caller}: padding must be >= 0, got {padding}")


class CapsuleConv2d(nn.Module):
    """A convolutional layer of capsules with dynamic routing in every window.

    Maps u [B, in_types, in_dim, H, W] to v [B, out_types, out_dim, H', W']; see
    :func:`fused_routing_conv`.

    Args:
        in_types: types of input capsules C, each on the whole grid.
        in_dim: their dimension K.
        out_types: types of output capsules J.
        out_dim: their dimension D.
        kernel_size: side of the window.
        stride, padding: of the window.
        num_iterations: routing iterations R.
        bias: learn a bias [J, D], added to s in every iteration, initially 0.1.
        leaky, routing_gradient, backend: as in :func:`fused_routing`.
        device, dtype: of the parameters.

    Parameters: ``weight`` [C, kernel_size, kernel_size, J, D, K], initially normal with a standard
    deviation of 0.1, and ``bias`` [J, D] or None.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_types: int,
        in_dim: int,
        out_types: int,
        out_dim: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        num_iterations: int = 3,
        bias: bool = False,
        *,
        leaky: bool = False,
        routing_gradient: str = "full",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        caller = "CapsuleConv2d"
        for name, value in (
            ("in_types", in_types),
            ("in_dim", in_dim),
            ("out_types", out_types),
            ("out_dim", out_dim),
            ("kernel_size", kernel_size),
            ("stride", stride),
            ("num_iterations", num_iterations),
        ):
            check_int(name, value, caller)
        check_padding(padding, caller)
        check_bool("bias", bias, caller)
        check_bool("leaky", leaky, caller)
        check_choice("routing_gradient", routing_gradient, ROUTING_GRADIENTS, caller)
        check_choice("backend", backend, CHOICES, caller)
        self.stride = stride
        self.padding = padding
        self.num_iterations = num_iterations
        self.leaky = leaky
        self.routing_gradient = routing_gradient
        self.backend = backend
        shape = (in_types, kernel_size, kernel_size, out_types, out_dim, in_dim)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(out_types, out_dim, device=device, dtype=dtype))
            if bias
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.1)
        if self.bias is not None:
            nn.init.constant_(self.bias, 0.1)

    def forward(self, u: Tensor) -> Tensor:
        """Output capsules [B, J, D, H', W'] for input capsules [B, C, K, H, W]."""
        return fused_routing_conv(
            u,
            self.weight,
            self.num_iterations,
            stride=self.stride,
            padding=self.padding,
            bias=self.bias,
            leaky=self.leaky,
            routing_gradient=self.routing_gradient,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        C, kernel_size, _, J, D, K = self.weight.shape
        return (
            f"in_types={C}, in_dim={K}, out_types={J}, out_dim={D}, kernel_size={kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, "
            f"num_iterations={self.num_iterations}, bias={self.bias is not None}, "
            f"leaky={self.leaky}, routing_gradient={self.routing_gradient!r}, "
            f"backend={self.backend!r}"
        )
