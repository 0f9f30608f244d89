"""Differentiation: the fused forward and backward operators as ``torch.autograd.Function``.

First derivatives are fused. Second and higher ones, and forward mode, come from the oracle, which
stores ``u_hat``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import vmap  # noqa: F401  (registers the operators' rules for it)
from .ops import OPERATORS
from .reference import reference_routing
from .windows import capsules


@dataclass(frozen=True)
class Options:
    """What is no tensor of a call: as in :func:`capsule_kernels.fused_routing`.

    ``backend`` is the one that runs; u and ``window`` as in
    :data:`capsule_kernels.ops.FORWARD_SCHEMA`.
    """

    backend: str
    num_iterations: int
    leaky: bool
    weight_sharing: int
    routing_gradient: str
    return_coupling: bool
    window: tuple[int, ...] | None = None


def forward_operator(
    u: Tensor, weight: Tensor, logits: Tensor | None, bias: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """(v, coupling, s) by the fused operator: what both forms of the function start with."""
    v, s, coupling = OPERATORS[options.backend].forward(
        u,
        weight,
        logits,
        bias,
        options.num_iterations,
        options.leaky,
        options.weight_sharing,
        options.return_coupling,
        options.window,
        options.routing_gradient == "full",
    )
    return v, coupling, s


def undifferentiated(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`forward_operator` past its own derivative (:func:`differentiate`), which takes 10 us.

    Not while it is compiled, where that costs nothing and such a block is not known.
    """
    if torch.compiler.is_compiling():
        return forward_operator(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return forward_operator(*inputs)


class FusedRouting(torch.autograd.Function):
    """Routing whose forward and backward are one fused operator each; ``u_hat`` is never stored.

    Saved for the backward: the inputs and ``s`` [R, B, J, D], the total inputs of every iteration.
    Not to be applied directly: :func:`capsule_kernels.fused_routing` checks the arguments and
    chooses the backend, and applies it where a gradient is wanted.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        v, coupling, s = undifferentiated(*inputs)
        remember(ctx, inputs, s)
        ctx.mark_non_differentiable(coupling)
        return v, coupling

    @staticmethod
    def backward(ctx: Any, grad_v: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
        return gradients(ctx, grad_v, asked_for(ctx))


def remember(ctx: Any, inputs: tuple[Any, ...], s: Tensor) -> None:
    """Save what :func:`gradients` needs of the inputs of :func:`forward_operator`."""
    *tensors, ctx.options = inputs
    ctx.save_for_backward(*tensors, s)


def asked_for(ctx: Any) -> tuple[bool, ...]:
    """Which gradients, of u, weight, logits and bias, this run of the engine is to find.

    ``needs_input_grad`` says which require one: all parameters, too, where
    ``torch.autograd.grad(v, u)`` wants no more than that of u.
    """
    required = ctx.needs_input_grad[:4]
    if torch.compiler.is_compiling():
        return required
    nodes = (node for node, _ in ctx.next_functions if node is not None)
    return tuple(need and will_run(next(nodes)) for need in required)


def will_run(node: Any) -> bool:
    """Whether the engine, in the backward that is running, goes on to a node of the graph."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient torch.autograd.grad returns
        return True


def gradients(ctx: Any, grad_v: Tensor, wanted: tuple[bool, ...]) -> tuple[Any, ...]:
    """A backward's result: the gradients that are ``wanted``, None for all other arguments."""
    saved = ctx.saved_tensors  # once: a checkpoint gives them but one time
    arguments = (grad_v, *saved, ctx.options, *wanted)
    # Is this backward itself differentiated? By reverse mode (create_graph=True, torch.func.grad)
    # where grad mode is on, by forward mode at any of its levels.
    if torch.is_grad_enabled() and is_batched_by_autograd(grad_v):
        # torch.autograd.grad(is_grads_batched=True, create_graph=True): PyTorch's older vmap loses
        # the graph of an autograd.Function, but not that of the oracle's operations.
        some = iter(vector_jacobian(oracle_of(ctx.options), saved[:-1], wanted, grad_v))
        found = tuple(next(some) if want else None for want in wanted)
    elif torch.is_grad_enabled() or forward_ad._current_level >= 0:
        found = FusedRoutingBackward.apply(*arguments)
    else:
        found = backward_operator(*arguments)
    return *(g if want else None for g, want in zip(found, wanted, strict=True)), None


def is_batched_by_autograd(x: Tensor) -> bool:
    """Whether PyTorch's older vmap maps over x, or over what ``torch.func`` has wrapped in it."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return torch._C._functorch.is_legacy_batchedtensor(x)


class TransformableRouting(torch.autograd.Function):
    """:class:`FusedRouting` for ``torch.func`` (grad, vmap, jvp and what is made of them).

    The form such transforms ask for costs several times the call itself, so it is used only under
    them. The operators' rules for vmap are in :mod:`capsule_kernels.vmap`.
    """

    generate_vmap_rule = True

    forward = staticmethod(forward_operator)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, coupling, s = output
        remember(ctx, inputs, s)
        ctx.save_for_forward(*inputs[:-1], s)
        ctx.mark_non_differentiable(coupling, s)

    @staticmethod
    def backward(ctx: Any, grad_v: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
        return gradients(ctx, grad_v, ctx.needs_input_grad[:4])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None, None]:
        *inputs, s = ctx.saved_tensors
        v_like = inputs[0].new_zeros(s.shape[1:])
        return jacobian_vector(oracle_of(ctx.options), inputs, tangents[:-1], v_like), None, None


def needs_plain_operations() -> bool:
    """Whether forward mode surrounds this call in a way that a Function's ``jvp`` can't serve.

    Under ``torch.func`` levels outside of a Function do not see its ``jvp``: forward mode of
    forward mode would be 0, and of vmap ends in an assertion of PyTorch's. Where hooks are told of
    saved tensors, as in a checkpoint or ``save_on_cpu``, ``torch.func.vjp``, which the ``jvp`` is
    made of, refuses to run. The oracle, which the ``jvp`` takes anyway, does neither.
    """
    return forward_ad._current_level >= 0 and (
        torch._C._are_functorch_transforms_active()
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


def transformed(caller: str) -> bool:
    """Whether a ``torch.func`` transform or forward-mode differentiation surrounds this call.

    Raises ``RuntimeError`` in the name of ``caller`` under ``torch.export`` and ``torch.compile``,
    whose traces of such transforms lose gradients.
    """
    found = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if not found or not torch.compiler.is_compiling():
        return found
    what = f"{caller}: torch.func transforms and forward-mode differentiation inside"
    # In Dynamo torch 2.9 says that all it compiles is exported.
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        raise RuntimeError(
            f"{what} torch.export are not supported, except vmap with backend='reference'; take "
            "gradients of the exported program, by torch.autograd"
        )
    raise RuntimeError(
        f"{what} torch.compile are not supported; call them outside of the compiled function, or "
        "compile without fullgraph=True"
    )


def differentiate(backend: str) -> None:
    """Give a forward operator a derivative of its own: that of a graph that holds it.

    Exported and traced programs have no :class:`FusedRouting` any more. Without this, PyTorch would
    take what lies before the operator for constant.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, R, leaky, weight_sharing, return_coupling, window, full = inputs
        gradient = "full" if full else "last"
        options = Options(
            backend, R, leaky, weight_sharing, gradient, return_coupling, window and tuple(window)
        )
        _, s, coupling = output
        remember(ctx, (*tensors, options), s)
        ctx.mark_non_differentiable(s, coupling)

    def backward(ctx: Any, grad_v: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
        *found, _ = gradients(ctx, grad_v, asked_for(ctx))
        return *found, *[None] * 6

    torch.library.register_autograd(
        OPERATORS[backend].forward, backward, setup_context=setup_context
    )


for _backend in OPERATORS:
    differentiate(_backend)


def backward_operator(
    grad_v: Tensor,
    u: Tensor,
    weight: Tensor,
    logits: Tensor | None,
    bias: Tensor | None,
    s: Tensor,
    options: Options,
    *wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, weight, logits and bias by the fused operator; [0] where not wanted."""
    return OPERATORS[options.backend].backward(
        grad_v,
        u,
        weight,
        logits,
        s,
        options.leaky,
        options.weight_sharing,
        options.routing_gradient == "full",
        list(wanted),
        options.window,
    )


class FusedRoutingBackward(torch.autograd.Function):
    """:func:`backward_operator` as a differentiable function of ``grad_v`` and the inputs."""

    generate_vmap_rule = True

    forward = staticmethod(backward_operator)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, _, ctx.options = inputs[:7]
        ctx.wanted = inputs[7:]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *second_gradients: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[:5]
        cotangents = tuple(h for h, w in zip(second_gradients, ctx.wanted, strict=True) if w)
        function = FusedRoutingBackward.by_oracle(ctx)
        found = iter(vector_jacobian(function, ctx.saved_tensors, needed, cotangents))
        return *(next(found) if need else None for need in needed), *[None] * 6

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        function = FusedRoutingBackward.by_oracle(ctx)
        inputs = ctx.saved_tensors[1:]
        like = tuple(torch.zeros_like(x) for x, w in zip(inputs, ctx.wanted, strict=True) if w)
        found = iter(jacobian_vector(function, ctx.saved_tensors, tangents[:5], like))
        empty = inputs[0].new_zeros(0)
        return tuple(next(found) if w else empty for w in ctx.wanted)

    @staticmethod
    def by_oracle(ctx: Any) -> Callable[..., tuple[Tensor, ...]]:
        """The gradients that are wanted, as a function of grad_v, u, weight, logits and bias."""
        oracle, wanted = oracle_of(ctx.options), ctx.wanted
        return lambda grad_v, *inputs: vector_jacobian(oracle, inputs, wanted, grad_v)


def by_oracle(
    u: Tensor, weight: Tensor, logits: Tensor | None, bias: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """(v, coupling) by the oracle."""
    return reference_routing(
        capsules(u, options.window),
        weight,
        options.num_iterations,
        logits=logits,
        bias=bias,
        leaky=options.leaky,
        weight_sharing=options.weight_sharing,
        routing_gradient=options.routing_gradient,
        return_coupling=True,
    )


def oracle_of(options: Options) -> Callable[..., Tensor]:
    """v by the oracle, as a function of u, weight, logits and bias."""
    return lambda u, weight, logits, bias: by_oracle(u, weight, logits, bias, options)[0]


def vector_jacobian(
    function: Callable[..., Any], values: Sequence[Any], wanted: Sequence[bool], cotangents: Any
) -> tuple[Tensor, ...]:
    """Gradients of ``function(*values)`` with respect to the values that are ``wanted``.

    Computed without autocast, which would cast inside of the oracle and of its gradients.
    """

    def of_wanted(*chosen: Tensor) -> Any:
        rest = iter(chosen)
        return function(*(next(rest) if w else x for x, w in zip(values, wanted, strict=True)))

    chosen = (x for x, w in zip(values, wanted, strict=True) if w)
    with torch.autocast(values[0].device.type, enabled=False):
        pull_back = torch.func.vjp(of_wanted, *chosen)[1]
        return pull_back(cotangents)


def jacobian_vector(
    function: Callable[..., Any], values: Sequence[Any], tangents: Sequence[Any], like: Any
) -> Any:
    """How ``function(*values)`` moves along the tangents, None where a value stays.

    Forward mode by reverse mode twice: gradients are linear in the cotangents, and the transpose of
    that map is the derivative. ``like``: zeros in the shapes of the function's results.
    """
    moved = [tangent is not None for tangent in tangents]
    with torch.autocast(values[0].device.type, enabled=False):
        pull_back = torch.func.vjp(lambda x: vector_jacobian(function, values, moved, x), like)[1]
        return pull_back(tuple(tangent for tangent in tangents if tangent is not None))[0]
