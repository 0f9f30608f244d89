"""The public function: :func:`fused_routing`."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .autograd import (
    FusedRouting,
    Options,
    TransformableRouting,
    by_oracle,
    forward_operator,
    needs_plain_operations,
    transformed,
    undifferentiated,
)
from .dispatch import select_backend
from .validation import check_arguments


@overload
def fused_routing(
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
    backend: str = "auto",
) -> Tensor: ...


@overload
def fused_routing(
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
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


@overload
def fused_routing(
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
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...


def fused_routing(
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
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Dynamic routing between capsules, fused: the predictions ``u_hat`` are never stored.

    Procedure 1 of Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules" (2017, arXiv
    1710.09829)::

        u_hat_ij = W_ij u_i                              (equation 2)
        b = logits (0 unless given)
        repeat num_iterations times:
            c_i = softmax over j of b_i                  (equation 3)
            s_j = sum_i c_ij u_hat_ij + bias_j           (equation 2)
            v_j = |s_j|^2 / (1 + |s_j|^2) * s_j / |s_j|  (equation 1; 0 where s_j is 0)
            b_ij += u_hat_ij . v_j

    for every one of B samples; I input capsules of dimension K, J output capsules of dimension D.
    B may be 0, the other sizes are 1 or more.

    Args:
        u: input capsules, [B, I, K]; float64, float32, bfloat16 or float16. All tensors may have
            any strides.
        weight: transformation matrices W, [I // weight_sharing, J, D, K]. Like logits and bias it
            has the dtype and the device of u.
        num_iterations: routing iterations R >= 1; the paper uses 3.
        logits: log priors that capsule i couples to capsule j, [I, J]; zeros if None.
        bias: added to s in every iteration, [J, D] (the authors' code learns one); zeros if None.
        leaky: put one more logit, fixed at 0, into the softmax: "none of the above". The coupling
            coefficients of a capsule then sum to less than 1.
        weight_sharing: how many consecutive input capsules share one weight (capsules of one type);
            it divides I.
        routing_gradient: "full" differentiates through every iteration; "last" treats the
            agreements as constants, so that only the last iteration is differentiated.
        return_coupling: also return c of the last iteration, [B, I, J], in the dtype of u and not
            differentiable.
        backend: "auto" chooses by device, dtype and sizes ("reference" in ``torch.onnx.export``);
            "reference" | "cpu" | "triton" | "cuda" is used or raises the reason why it can't be;
            see :func:`capsule_kernels.backends`.

    Returns:
        Output capsules v, [B, J, D], in the dtype of u; with ``return_coupling`` the pair (v, c).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for can't be used; the message says why.

    Example::

        u = torch.randn(128, 1152, 8)
        weight = 0.1 * torch.randn(1152, 10, 16, 8)
        v = fused_routing(u, weight)  # [128, 10, 16]

    Precision: accumulation is in float32, or float64 for float64 inputs. Products of float32 on a
    GPU are true float32 unless ``torch.backends.cuda.matmul.fp32_precision``, which
    ``torch.set_float32_matmul_precision()`` sets, allows TF32. Under ``torch.autocast`` the inputs
    are cast as for a matrix product. The fused backends give the same bits for the same input.

    Derivatives: v is differentiable in u, weight, logits and bias. First derivatives are fused.
    Second and higher ones and forward mode (``torch.func.jvp``) are exact too, but store u_hat.
    ``torch.func.vmap`` takes mapped u as one larger batch; where other arguments are mapped it
    makes one call for each index. Inside ``torch.compile`` plain gradients work, transforms of
    ``torch.func`` do not.
    """
    caller = "fused_routing"
    if autocast := under_autocast(u):
        u, weight, logits, bias = cast_as_products(u, weight, logits, bias)
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
        caller,
    )
    if isinstance(weight_sharing, torch.SymInt):
        # From a size that an exported program leaves open; the operators take a number alone.
        weight, weight_sharing = weight.repeat_interleave(weight_sharing, dim=0), 1
    backend = select_backend(caller, backend, u, weight, num_iterations, weight_sharing)
    options = Options(
        backend, num_iterations, leaky, weight_sharing, routing_gradient, return_coupling
    )
    v, coupling = route(caller, u, weight, logits, bias, options, autocast)
    return (v, coupling) if return_coupling else v


def route(
    caller: str,
    u: Tensor,
    weight: Tensor,
    logits: Tensor | None,
    bias: Tensor | None,
    options: Options,
    autocast: bool,
) -> tuple[Tensor, Tensor]:
    """Checked arguments on their way to a backend: v and, where asked for, the coupling."""
    if autocast:  # it has cast the arguments, and shall not cast in between
        with torch.autocast(u.device.type, enabled=False):
            return route(caller, u, weight, logits, bias, options, autocast=False)
    inputs = (u, weight, logits, bias, options)
    if options.backend == "reference":
        return by_oracle(*inputs)
    if transformed(caller):
        function = by_oracle if needs_plain_operations() else TransformableRouting.apply
    elif torch.compiler.is_compiling() or torch.jit.is_tracing():
        # A program keeps operators. Their own derivatives notice what is changed in place, which
        # Dynamo does not for an autograd.Function, and are cached with what is compiled.
        function = forward_operator
    elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[:4]):
        function = FusedRouting.apply
    else:
        function = undifferentiated
    v, coupling, *_ = function(*inputs)
    return v, coupling


def under_autocast(u: Any) -> bool:
    """Whether autocast is on where u lives. It does not know the meta device."""
    return (
        isinstance(u, Tensor)
        and u.device.type != "meta"
        and torch.is_autocast_enabled(u.device.type)
    )


def cast_as_products(u: Tensor, *others: Any) -> list[Any]:
    """Autocast's cast of what enters a matrix product: to its dtype, but for float64."""
    dtype = torch.get_autocast_dtype(u.device.type)

    def cast(x: Any) -> Any:
        eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if eligible else x

    return [cast(x) for x in (u, *others)]
