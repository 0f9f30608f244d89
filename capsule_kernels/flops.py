"""``import capsule_kernels.flops`` has ``torch.utils.flop_counter.FlopCounterMode`` count routing.

The package doesn't import this by itself: PyTorch's counter imports Triton, which takes a second.

Counted is what the oracle multiplies, on every backend, so that counts compare networks and not
implementations of them. Kernels compute more, predictions in every sweep, or less, in another
order.
"""

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = tuple[int, ...]


@register_flop_formula(torch.ops.capsule_kernels.routing_forward)
def forward_flops(
    u: Shape,
    weight: Shape,
    logits: Shape | None,
    bias: Shape | None,
    num_iterations: int,
    leaky: bool,
    weight_sharing: int,
    *_: Any,
    out_shape: tuple[Shape, ...],
    **__: Any,
) -> int:
    """Predictions, a weighted sum an iteration, an agreement between two."""
    v = out_shape[0]
    K = weight[-1]
    return one_product(v, weight, weight_sharing) * (K + 2 * num_iterations - 1)


@register_flop_formula(torch.ops.capsule_kernels.routing_backward)
def backward_flops(
    grad_v: Shape,
    u: Shape,
    weight: Shape,
    logits: Shape | None,
    s: Shape,
    leaky: bool,
    weight_sharing: int,
    full_gradient: bool,
    output_mask: list[bool],
    *_: Any,
    **__: Any,
) -> int:
    """Of each of these products the gradients that lead to a wanted one."""
    wants_u, wants_weight, wants_logits = output_mask[:3]
    K, R = weight[-1], s[0] if full_gradient else 1
    of_predictions = wants_u or wants_weight
    sums = of_predictions * R + (R - 1) + wants_logits
    agreements = (of_predictions + 1) * (R - 1)
    products = K * (wants_u + wants_weight) + sums + agreements
    return one_product(grad_v, weight, weight_sharing) * products


def one_product(v: Shape, weight: Shape, weight_sharing: int) -> int:
    """Of predictions [B, I, J, D] with as many numbers: a multiplication and an addition each."""
    I = weight[0] * weight_sharing
    return 2 * math.prod(v) * I
