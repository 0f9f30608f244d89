"""The operators: their checks and results, and which kernels are to fill them."""

from collections.abc import Callable, Sequence

from torch import Tensor

from ...ops import backward_shapes, forward_shapes
from . import config, launch_sweeps, launch_wide
from .checks import check_backward, check_forward
from .routing import Routing, device_guard, laid_out, run


def routing_forward(
    u: Tensor,
    weight: Tensor,
    logits: Tensor | None,
    bias: Tensor | None,
    num_iterations: int,
    leaky: bool,
    weight_sharing: int,
    return_coupling: bool,
    window: Sequence[int] | None = None,
    *,
    launch: Callable[..., None] = run,
    gpu: config.Gpu | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """v, s and coupling, as ``ops.FORWARD_SCHEMA`` describes them."""
    check_forward(u, weight, logits, bias, num_iterations, weight_sharing, window)
    v, s, coupling = forward_shapes(
        u, weight, logits, bias, num_iterations, leaky, weight_sharing, return_coupling, window
    )
    if u.shape[0] == 0:
        return v, s, coupling
    routing = Routing.of(launch, gpu, False, u, weight, logits, s, leaky, weight_sharing, window)
    bias = None if bias is None else laid_out(bias)
    forward = launch_wide.forward if routing.wide else launch_sweeps.forward
    with device_guard(u.device):
        forward(routing, bias, v, coupling if return_coupling else None)
    return v, s, coupling


def routing_backward(
    grad_v: Tensor,
    u: Tensor,
    weight: Tensor,
    logits: Tensor | None,
    s: Tensor,
    leaky: bool,
    weight_sharing: int,
    full_gradient: bool,
    output_mask: list[bool],
    window: Sequence[int] | None = None,
    *,
    launch: Callable[..., None] = run,
    gpu: config.Gpu | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients asked for, as ``ops.BACKWARD_SCHEMA`` describes them."""
    check_backward(grad_v, u, weight, logits, s, weight_sharing, window)
    gradients = backward_shapes(
        grad_v, u, weight, logits, s, leaky, weight_sharing, full_gradient, output_mask, window
    )
    if u.shape[0] == 0 or not any(output_mask):
        for gradient in gradients:
            gradient.zero_()
        return gradients
    s = laid_out(s)  # torch.func.vmap hands on slices
    routing = Routing.of(launch, gpu, True, u, weight, logits, s, leaky, weight_sharing, window)
    wanted = (g if want else None for g, want in zip(gradients, output_mask, strict=True))
    backward = launch_wide.backward if routing.wide else launch_sweeps.backward
    with device_guard(u.device):
        backward(routing, laid_out(grad_v), full_gradient, *wanted)
    return gradients
