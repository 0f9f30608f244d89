"""``torch.func`` over the op: what the oracle gives under the same transform."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from capsule_kernels import CapsuleLinear, autograd, fused_routing, reference_routing

from .cases import Case, make_inputs, route
from .targets import NEEDS_KERNELS

Function = Callable[..., Tensor]


def scalar(f: Function) -> Function:
    return lambda u, weight: f(u, weight).square().sum()


def per_sample_gradients(f: Function) -> Function:
    loss = grad(lambda weight, sample: f(sample[None], weight).square().sum())
    return lambda u, weight: vmap(loss, (None, 0))(weight, u)


def scaled(x: Tensor, dim: int = 0) -> Tensor:
    """Three different x along a new dimension."""
    return torch.stack([x, 2 * x, -x], dim)


TRANSFORMS: dict[str, Callable[[Function], Callable[[Tensor, Tensor], Any]]] = {
    "grad": lambda f: grad(scalar(f), (0, 1)),
    "third order": lambda f: grad(scalar(grad(scalar(grad(scalar(f)))))),
    "vmap over u": lambda f: lambda u, w: vmap(f, (0, None))(scaled(u), w),
    "vmap over u, last dimension": lambda f: lambda u, w: vmap(f, (3, None))(scaled(u, 3), w),
    "vmap over weight": lambda f: lambda u, w: vmap(f, (None, 1))(u, scaled(w, 1)),
    "vmap over both": lambda f: lambda u, w: vmap(f)(scaled(u), scaled(w)),
    "vmap of vmap": lambda f: (
        lambda u, w: vmap(vmap(f, (0, None)), (None, 0))(scaled(u), scaled(w))
    ),
    "vmap of grad": per_sample_gradients,
    "grad of vmap": lambda f: (
        lambda u, w: grad(lambda w: vmap(f, (0, None))(scaled(u), w).square().sum())(w)
    ),
    "jvp": lambda f: lambda u, w: jvp(f, (u, w), (u.cos(), w.sin())),
    "jvp of u": lambda f: lambda u, w: jvp(lambda u: f(u, w), (u,), (u.cos(),)),
    "jvp of grad": lambda f: lambda u, w: jvp(lambda u: grad(scalar(f))(u, w), (u,), (u.cos(),)),
    "jacrev": lambda f: jacrev(f, (0, 1)),
    "jacfwd": lambda f: jacfwd(f, (0, 1)),
    "hessian": lambda f: hessian(scalar(f), (0, 1)),
    "jacfwd of jacfwd": lambda f: lambda u, w: jacfwd(jacfwd(lambda u: scalar(f)(u, w)))(u),
    "jacrev of jacfwd": lambda f: lambda u, w: jacrev(jacfwd(lambda u: scalar(f)(u, w)))(u),
    "jvp of vmap": lambda f: (
        lambda u, w: jvp(lambda u: vmap(f, (0, None))(scaled(u), w), (u,), (u.cos(),))
    ),
    "hessian of vmap": lambda f: (
        lambda u, w: hessian(lambda u: vmap(scalar(f), (0, None))(scaled(u), w).sum())(u)
    ),
}
CASES = [
    Case(B=2, I=4, J=3, K=2, D=3, logits=True, bias=True, leaky=True),
    Case(B=2, I=4, J=3, K=2, D=3, weight_sharing=2, routing_gradient="last"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_matches_the_oracle(name: str, case: Case) -> None:
    inputs = make_inputs(case, torch.float64)

    def bind(routing: Any) -> Function:
        return lambda u, weight: route(routing, case, inputs | {"u": u, "weight": weight})

    found, expected = (
        TRANSFORMS[name](bind(routing))(inputs["u"].detach(), inputs["weight"].detach())
        for routing in (fused_routing, reference_routing)
    )
    torch.testing.assert_close(found, expected)


def test_coupling_is_mapped_too() -> None:
    inputs = make_inputs(CASES[0], torch.float64)
    u, weight = inputs["u"].detach(), inputs["weight"].detach()
    for dims, arguments in (((0, None), (scaled(u), weight)), ((None, 0), (u, scaled(weight)))):
        found, expected = (
            vmap(lambda u, w: f(u, w, return_coupling=True), dims)(*arguments)  # noqa: B023
            for f in (fused_routing, reference_routing)
        )
        torch.testing.assert_close(found, expected)


def test_nothing_is_mapped() -> None:
    """An empty batch of calls has shapes, as in PyTorch's own operations."""
    inputs = make_inputs(CASES[0], torch.float32)
    u, weight = inputs["u"].detach(), inputs["weight"].detach()
    for f in (fused_routing, reference_routing):
        shapes = [
            vmap(lambda u: f(u, weight))(u.new_empty(0, *u.shape)).shape,  # noqa: B023
            vmap(lambda w: f(u, w))(weight.new_empty(0, *weight.shape)).shape,  # noqa: B023
            vmap(lambda u: f(u, weight, return_coupling=True)[1])(  # noqa: B023
                u.new_empty(0, *u.shape)
            ).shape,
            per_sample_gradients(f)(u[:0], weight).shape,
        ]
        assert shapes == [(0, 2, 3, 3), (0, 2, 3, 3), (0, 2, 4, 3), (0, *weight.shape)]


MOVED = {
    "u": lambda u, w, f: f(forward_ad.make_dual(u, u.cos()), w),
    "u, which is no leaf": lambda u, w, f: f(forward_ad.make_dual(u, u.cos()).sin(), w),
    "weight": lambda u, w, f: f(u, forward_ad.make_dual(w, w.cos())),
    "both": lambda u, w, f: f(
        forward_ad.make_dual(u, u.cos()), forward_ad.make_dual(w, w.sin()).exp()
    ),
    "the output": lambda u, w, f: forward_ad.make_dual(f(u, w), torch.ones(2, 3, 3).double()),
}


@pytest.mark.parametrize("moved", MOVED)
def test_forward_mode_over_a_backward(moved: str) -> None:
    """How gradients move: Hessians times a vector by ``forward_ad``, without grad mode."""
    inputs = make_inputs(CASES[0], torch.float64)
    u, weight = inputs["u"], inputs["weight"]

    def tangents(f: Function) -> list[Tensor]:
        with forward_ad.dual_level():
            loss = MOVED[moved](u, weight, f).square().sum()
            gradients = torch.autograd.grad(loss, (u, weight))
            return [forward_ad.unpack_dual(g).tangent for g in gradients]

    found, expected = tangents(fused_routing), tangents(reference_routing)
    assert all(x is not None for x in expected)
    torch.testing.assert_close(found, expected)


def test_a_tangent_of_grad_v() -> None:
    inputs = make_inputs(CASES[0], torch.float64)
    u, weight = inputs["u"], inputs["weight"]
    results = []
    for f in (fused_routing, reference_routing):
        v = f(u, weight)
        with forward_ad.dual_level():
            grad_v = forward_ad.make_dual(torch.ones_like(v), v.detach().cos())
            gradients = torch.autograd.grad(v, (u, weight), grad_v)
            results.append([forward_ad.unpack_dual(g).tangent for g in gradients])
    torch.testing.assert_close(*results)


def test_forward_mode_without_torch_func() -> None:
    inputs = make_inputs(CASES[0], torch.float64)
    u, weight = inputs["u"].detach(), inputs["weight"].detach()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(u, u.cos())
        found, expected = (
            forward_ad.unpack_dual(f(dual, weight)).tangent
            for f in (fused_routing, reference_routing)
        )
    torch.testing.assert_close(found, expected)


def saved_on_cpu(f: Function, *arguments: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return f(*arguments)


checkpointed = pytest.param(
    partial(checkpoint, use_reentrant=False),
    marks=pytest.mark.skipif(
        torch.__version__ < "2.12", reason="checkpoints of torch 2.9 and 2.11 have no forward mode"
    ),
)


@pytest.mark.parametrize("packed", [saved_on_cpu, checkpointed])
def test_forward_mode_where_saved_tensors_are_packed(packed: Function) -> None:
    """As a checkpoint does, inside of which ``torch.func`` takes no gradients."""
    inputs = make_inputs(CASES[0], torch.float64)
    u, weight = inputs["u"].detach(), inputs["weight"].detach()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(u, u.cos())
        found, expected = (
            forward_ad.unpack_dual(packed(lambda u: f(u, weight), dual))  # noqa: B023
            for f in (fused_routing, reference_routing)
        )
    torch.testing.assert_close(found, expected)
    assert found.tangent.any()


def test_an_ensemble_of_seven() -> None:
    """Seven layers as one, as the seven networks of the paper's CIFAR-10 result."""
    torch.manual_seed(0)
    layers = [CapsuleLinear(5, 4, 3, 2, bias=True) for _ in range(7)]
    parameters, buffers = stack_module_state(layers)
    u = torch.randn(6, 5, 4)

    def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(layers[0], (parameters, buffers), (u,))

    v = vmap(one)(parameters, buffers)
    assert torch.equal(v, torch.stack([layer(u) for layer in layers]))
    v.square().sum().backward()
    for n, layer in enumerate(layers):
        layer(u).square().sum().backward()
        assert torch.equal(parameters["weight"].grad[n], layer.weight.grad)
        assert torch.equal(parameters["bias"].grad[n], layer.bias.grad)


@NEEDS_KERNELS
def test_the_costlier_form_only_under_a_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def noting(function: Any) -> Any:
        forward = function.forward

        def forward_noted(*arguments: Any) -> Any:
            used.append(function)
            return forward(*arguments)

        return staticmethod(forward_noted)

    for function in (autograd.FusedRouting, autograd.TransformableRouting):
        monkeypatch.setattr(function, "forward", noting(function))
    inputs = make_inputs(CASES[0], torch.float64)
    fused_routing(inputs["u"], inputs["weight"])
    grad(lambda u: fused_routing(u, inputs["weight"].detach()).sum())(inputs["u"].detach())
    assert used == [autograd.FusedRouting, autograd.TransformableRouting]


@pytest.fixture
def gradient() -> Iterator[Function]:
    weight = make_inputs(CASES[0], torch.float64)["weight"].detach()
    yield grad(lambda u: fused_routing(u, weight).sum())
    torch._dynamo.reset()  # it remembers functions that it failed to compile, for later tests too


@NEEDS_KERNELS
def test_under_compile_a_sentence(gradient: Function) -> None:
    u = make_inputs(CASES[0], torch.float64)["u"].detach()
    whole = torch.compile(gradient, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"torch.func transforms .* inside torch.compile are not"):
        whole(u)


@pytest.mark.parametrize("name", ["grad", "vmap of grad", "jvp"])
def test_under_compile_the_oracle_can_be_transformed(name: str) -> None:
    inputs = make_inputs(CASES[0], torch.float64)
    u, weight = inputs["u"].detach(), inputs["weight"].detach()
    f = TRANSFORMS[name](lambda u, w: fused_routing(u, w, 2, backend="reference"))
    whole = torch.compile(f, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(u, weight), f(u, weight))
    torch._dynamo.reset()


@pytest.mark.skipif(
    torch.__version__ < "2.12",
    reason="torch 2.9 and 2.11 fail themselves on torch.func.grad with a graph break",
)
def test_under_compile_with_a_graph_break(gradient: Function) -> None:
    u = make_inputs(CASES[0], torch.float64)["u"].detach()
    assert torch.equal(torch.compile(gradient, backend="eager")(u), gradient(u))
