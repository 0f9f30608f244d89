"""The oracle: dynamic routing in plain PyTorch, as the paper writes it.

Everything else in this package is checked against this file. It stores the prediction
vectors ``u_hat`` [B, I, J, D], as every textbook implementation does.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from .validation import check_arguments, check_tensor


def squash(s: Tensor) -> Tensor:
    """Shrink ``s`` [..., D] to a length below 1, direction kept (Sabour et al. 2017, equation 1).

    Returns ``v = |s|^2 / (1 + |s|^2) * s / |s|``, with lengths over the last axis, in the shape and
    dtype of ``s``; computed in float32 or wider. ``squash(0) = 0``, and the gradient there is
    exactly 0. Raises ``TypeError`` where ``s`` is no tensor of floating-point numbers.
    """
    check_tensor("s", s, "[..., D]", None, "squash")
    dtype, s = s.dtype, s.to(torch.promote_types(s.dtype, torch.float32))
    # Lengths are taken of s / max|s|: squares of large or tiny components stay in range.
    scale = s.detach().abs().amax(-1, keepdim=True)
    nonzero = scale != 0
    scale = scale.where(nonzero, 1)
    unit_sum = (s / scale).square().sum(-1, keepdim=True)
    length = scale * unit_sum.where(nonzero, 1).sqrt()
    # Each form where neither it nor its gradient overflows.
    short, long = length.clamp_max(1), length.clamp_min(1)
    v = torch.where(length < 1, short / (1 + short * short) * s, s / (long + 1 / long))
    return v.where(nonzero, 0 * s).to(dtype)


@overload
def reference_routing(
    u: Tensor,
    weight: Tensor,
    num_iterations: int = 3,
    *,
    logits: Tensor | None = None,
    bias: Tensor | None = None,
    leaky: bool = False,
    weight_sharing: int = 1,
    routing_gradient: str = "full",
    return_coupling: Literal[False] = False,
) -> Tensor: ...


@overload
def reference_routing(
    u: Tensor,
    weight: Tensor,
    num_iterations: int = 3,
    *,
    logits: Tensor | None = None,
    bias: Tensor | None = None,
    leaky: bool = False,
    weight_sharing: int = 1,
    routing_gradient: str = "full",
    return_coupling: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def reference_routing(
    u: Tensor,
    weight: Tensor,
    num_iterations: int = 3,
    *,
    logits: Tensor | None = None,
    bias: Tensor | None = None,
    leaky: bool = False,
    weight_sharing: int = 1,
    routing_gradient: str = "full",
    return_coupling: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def reference_routing(
    u: Tensor,
    weight: Tensor,
    num_iterations: int = 3,
    *,
    logits: Tensor | None = None,
    bias: Tensor | None = None,
    leaky: bool = False,
    weight_sharing: int = 1,
    routing_gradient: str = "full",
    return_coupling: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The oracle: :func:`capsule_kernels.fused_routing` in plain PyTorch, which stores ``u_hat``.

    Procedure 1 of Sabour et al. 2017, line by line. Arguments, results and errors are those of
    ``fused_routing``, but there is no ``backend``: v [B, J, D] in the dtype of u, or with
    ``return_coupling`` the pair (v, c), c [B, I, J]. Computes in float32 or wider; under
    ``torch.autocast`` its products are cast as any others.
    """
    check_arguments(
        u,
        weight,
        num_iterations,
        logits,
        bias,
        leaky,
        weight_sharing,
        routing_gradient,
        return_coupling,
        "reference_routing",
    )
    dtype = torch.promote_types(u.dtype, torch.float32)
    W = weight.to(dtype).repeat_interleave(weight_sharing, dim=0)  # [I, J, D, K]
    u_hat = torch.einsum("ijdk,bik->bijd", W, u.to(dtype))
    B, I, J, _ = u_hat.shape
    b = u_hat.new_zeros(B, I, J) if logits is None else logits.to(dtype).expand(B, I, J)

    for iteration in range(1, num_iterations + 1):
        c = leaky_softmax(b) if leaky else b.softmax(dim=-1)
        s = torch.einsum("bij,bijd->bjd", c, u_hat)
        if bias is not None:
            s = s + bias.to(dtype)
        v = squash(s)
        if iteration < num_iterations:
            agreement = torch.einsum("bijd,bjd->bij", u_hat, v)
            b = b + (agreement if routing_gradient == "full" else agreement.detach())

    if return_coupling:
        return v.to(u.dtype), c.detach().to(u.dtype)
    return v.to(u.dtype)


def leaky_softmax(b: Tensor) -> Tensor:
    """Softmax over J and one more logit fixed at 0, whose share is dropped: "none of the above"."""
    return torch.cat([torch.zeros_like(b[..., :1]), b], dim=-1).softmax(dim=-1)[..., 1:]
