"""What the operators refuse: called directly, past the checks of ``fused_routing``, with other
shapes their kernels would read out of bounds."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops import accumulation_dtype
from ...validation import DTYPES
from ...windows import sizes


def check_forward(
    u: Tensor,
    weight: Tensor,
    logits: Tensor | None,
    bias: Tensor | None,
    num_iterations: int,
    weight_sharing: int,
    window: Sequence[int] | None,
) -> None:
    """Raise a ValueError for arguments that ``ops.FORWARD_SCHEMA`` does not describe."""
    _, J, D = check_inputs("routing_forward", u, weight, logits, weight_sharing, window)
    if num_iterations < 1:
        raise ValueError(f"routing_forward: num_iterations must be >= 1, got {num_iterations}")
    if bias is not None:
        check_tensor("routing_forward", "bias", bias, (J, D), u.dtype, u)


def check_backward(
    grad_v: Tensor,
    u: Tensor,
    weight: Tensor,
    logits: Tensor | None,
    s: Tensor,
    weight_sharing: int,
    window: Sequence[int] | None,
) -> None:
    """Raise a ValueError for arguments that ``ops.BACKWARD_SCHEMA`` does not describe."""
    B, J, D = check_inputs("routing_backward", u, weight, logits, weight_sharing, window)
    check_tensor("routing_backward", "grad_v", grad_v, (B, J, D), u.dtype, u)
    if s.dim() != 4 or s.shape[0] < 1:
        raise ValueError(f"routing_backward: s must have shape [R, B, J, D], got {list(s.shape)}")
    expected = (s.shape[0], B, J, D)
    check_tensor("routing_backward", "s", s, expected, accumulation_dtype(u.dtype), u)


def check_inputs(
    operator: str,
    u: Tensor,
    weight: Tensor,
    logits: Tensor | None,
    weight_sharing: int,
    window: Sequence[int] | None,
) -> tuple[int, int, int]:
    """B, J and D."""
    if u.dtype not in DTYPES:
        raise ValueError(
            f"{operator}: u must be float64, float32, bfloat16 or float16, got {u.dtype}"
        )
    if window:
        check_window(operator, u, weight_sharing, window)
    elif u.dim() != 3:
        raise ValueError(f"{operator}: u must have shape [B, I, K], got {list(u.shape)}")
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(
            f"{operator}: weight must have shape [I // weight_sharing, J, D, K], none of them 0, "
            f"got {list(weight.shape)}"
        )
    B, I = sizes(u, window)
    J, D = weight.shape[1:3]
    if weight_sharing < 1 or I % weight_sharing:
        raise ValueError(f"{operator}: weight_sharing must divide I = {I}, got {weight_sharing}")
    expected = (I // weight_sharing, J, D, u.shape[-1])
    check_tensor(operator, "weight", weight, expected, u.dtype, u)
    if logits is not None:
        check_tensor(operator, "logits", logits, (I, J), u.dtype, u)
    return B, J, D


def check_window(operator: str, u: Tensor, weight_sharing: int, window: Sequence[int]) -> None:
    if len(window) != 4 or u.dim() != 5 or weight_sharing != 1:
        raise ValueError(
            f"{operator}: a window of 4 integers takes u [B, H, W, C, K] and weight_sharing 1, "
            f"got {len(window)}, {list(u.shape)} and {weight_sharing}"
        )
    kh, kw, down, right = window
    if not (1 <= kh <= u.shape[1] and 1 <= kw <= u.shape[2] and down >= 1 and right >= 1):
        raise ValueError(
            f"{operator}: window must fit into the grid {list(u.shape[1:3])} and move by 1 or "
            f"more, got {list(window)}"
        )


def check_tensor(
    operator: str, name: str, x: Tensor, shape: Sequence[int], dtype: torch.dtype, u: Tensor
) -> None:
    if x.shape != shape or x.dtype != dtype or x.device != u.device:
        raise ValueError(
            f"{operator}: {name} must be {list(shape)} {dtype} on {u.device}, got "
            f"{list(x.shape)} {x.dtype} on {x.device}"
        )
