"""Differentiation: the fused forward and backward operators as ``torch.autograd.Function``."""

from typing import Any

import torch
from torch import Tensor

from .ops import OPERATORS
from .reference import reference_routing


class FusedRouting(torch.autograd.Function):
    """Routing whose forward and backward are one fused operator each; ``u_hat`` is never stored.

    Saved for the backward: the inputs and ``s`` [R, B, J, D], the total inputs of every iteration.
    Arguments in the order of :meth:`forward`; :func:`capsule_kernels.fused_routing` is the face.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        weight: Tensor,
        logits: Tensor | None,
        bias: Tensor | None,
        backend: str,
        num_iterations: int,
        leaky: bool,
        weight_sharing: int,
        routing_gradient: str,
        return_coupling: bool,
    ) -> tuple[Tensor, Tensor]:
        v, s, coupling = OPERATORS[backend].forward(
            u, weight, logits, bias, num_iterations, leaky, weight_sharing, return_coupling
        )
        ctx.save_for_backward(u, weight, logits, bias, s)
        ctx.options = (backend, leaky, weight_sharing, routing_gradient)
        ctx.mark_non_differentiable(coupling)
        return v, coupling

    @staticmethod
    def backward(ctx: Any, grad_v: Tensor, _grad_coupling: Tensor | None) -> tuple[Any, ...]:
        u, weight, logits, bias, s = ctx.saved_tensors
        arguments = (grad_v, u, weight, logits, bias, s, *ctx.options, ctx.needs_input_grad[:4])
        # Grad mode is on only under create_graph=True: then this backward is itself differentiated.
        run = FusedRoutingBackward.apply if torch.is_grad_enabled() else routing_gradients
        return *run(*arguments), *[None] * 6


def routing_gradients(
    grad_v: Tensor,
    u: Tensor,
    weight: Tensor,
    logits: Tensor | None,
    bias: Tensor | None,
    s: Tensor,
    backend: str,
    leaky: bool,
    weight_sharing: int,
    routing_gradient: str,
    needs_grad: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of u, weight, logits and bias by the fused operator; None where not needed."""
    gradients = OPERATORS[backend].backward(
        grad_v,
        u,
        weight,
        logits,
        s,
        leaky,
        weight_sharing,
        routing_gradient == "full",
        list(needs_grad),
    )
    return tuple(g if wanted else None for g, wanted in zip(gradients, needs_grad, strict=True))


class FusedRoutingBackward(torch.autograd.Function):
    """The backward as a function of ``grad_v`` and the inputs, differentiable for double backward.

    Its own values come from the fused operator; its derivatives come from the oracle, which stores
    ``u_hat``, and are differentiable again.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        grad_v, u, weight, logits, bias, _, _, leaky, weight_sharing, routing_gradient, needs = arguments
        ctx.save_for_backward(grad_v, u, weight, logits, bias)
        ctx.options = (arguments[5].shape[0], leaky, weight_sharing, routing_gradient, needs)
        return routing_gradients(*arguments)

    @staticmethod
    def backward(ctx: Any, *second_gradients: Tensor | None) -> tuple[Any, ...]:
        num_iterations, leaky, weight_sharing, routing_gradient, needs = ctx.options
        with torch.enable_grad():
            # Views: nodes of this graph alone, so that grad() below stops at them.
            grad_v, *inputs = (
                None if x is None else (x.view_as(x) if x.requires_grad else x.detach())
                for x in ctx.saved_tensors
            )
            leaves = [
                x if x is None or x.requires_grad or not wanted else x.requires_grad_()
                for x, wanted in zip(inputs, needs, strict=True)
            ]
            u, weight, logits, bias = leaves
            v = reference_routing(
                u,
                weight,
                num_iterations,
                logits=logits,
                bias=bias,
                leaky=leaky,
                weight_sharing=weight_sharing,
                routing_gradient=routing_gradient,
            )
            wanted = [x for x, need in zip(leaves, needs, strict=True) if need]
            first = torch.autograd.grad(
                v, wanted, grad_v, create_graph=True, allow_unused=True, materialize_grads=True
            )
            pairs = [
                (g, h)
                for g, h in zip(
                    first, (h for h, need in zip(second_gradients, needs, strict=True) if need), strict=True
                )
                if h is not None and g.requires_grad
            ]
            sources = (grad_v, *leaves)
            targets = [
                x for x, need in zip(sources, ctx.needs_input_grad[:5], strict=True) if need
            ]
            found = iter(
                torch.autograd.grad(
                    [g for g, _ in pairs],
                    targets,
                    [h for _, h in pairs],
                    create_graph=torch.is_grad_enabled(),
                    allow_unused=True,
                )
                if pairs and targets
                else [None] * len(targets)
            )
            gradients = [next(found) if need else None for need in ctx.needs_input_grad[:5]]
        return *gradients, *[None] * 6
