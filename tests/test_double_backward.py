"""Gradients of gradients, against the oracle differentiated by PyTorch and against differences."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jacrev, vmap
from torch.utils.checkpoint import checkpoint

from capsule_kernels import CapsuleLinear, backends, fused_routing, reference_routing

from .cases import Case, copies, make_inputs, route

SMALL = Case(B=2, I=4, J=3, K=2, D=3)
OPTIONS = [
    SMALL,
    Case(B=2, I=4, J=3, K=2, D=3, logits=True, bias=True),
    Case(B=2, I=4, J=3, K=2, D=3, leaky=True, weight_sharing=2),
    Case(B=2, I=4, J=3, K=2, D=3, routing_gradient="last", logits=True),
    Case(B=2, I=4, J=3, K=2, D=3, R=1, bias=True),
]


def derivatives(function: Any, case: Case, inputs: dict[str, Any]) -> list[Tensor]:
    """First, second and third derivatives of the sum of v, each of what came before."""
    leaves = [x for x in inputs.values() if x is not None and x.requires_grad]
    scalar, found = route(function, case, inputs).sum(), []
    for _ in range(3):
        # In just this form: the gradient that enters depends on nothing (it is all ones at first).
        gradients = torch.autograd.grad(
            scalar, leaves, create_graph=True, allow_unused=True, materialize_grads=True
        )
        found += gradients
        scalar = torch.stack([g.square().sum() for g in gradients]).sum()
        if not scalar.requires_grad:
            break
    return found


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_three_orders_match_the_oracle(case: Case) -> None:
    inputs = make_inputs(case, torch.float64)
    found = derivatives(fused_routing, case, inputs)
    expected = derivatives(reference_routing, case, copies(inputs, torch.float64))
    assert any(x.abs().max() > 0 for x in expected[-2:])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("case", OPTIONS[:3] + OPTIONS[4:], ids=str)
def test_gradgradcheck(case: Case) -> None:
    inputs = make_inputs(case, torch.float64)
    names = [name for name, x in inputs.items() if x is not None]

    def function(*leaves: Tensor) -> Tensor:
        return route(fused_routing, case, inputs | dict(zip(names, leaves, strict=True)))

    leaves = [inputs[name] for name in names]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("frozen", [f for f in product([False, True], repeat=4) if not all(f)])
def test_any_subset_requires_grad(frozen: tuple[bool, ...]) -> None:
    case = OPTIONS[1]
    inputs = make_inputs(case, torch.float64)
    oracle = copies(inputs, torch.float64)
    for leaves in (inputs, oracle):
        for x, freeze in zip(leaves.values(), frozen, strict=True):
            x.requires_grad_(not freeze)
    found = derivatives(fused_routing, case, inputs)
    torch.testing.assert_close(found, derivatives(reference_routing, case, oracle))


def test_first_derivatives_in_a_graph_are_the_fused_ones() -> None:
    inputs = make_inputs(SMALL, torch.float32)
    leaves = [inputs["u"], inputs["weight"]]
    plain = torch.autograd.grad(route(fused_routing, SMALL, inputs).sum(), leaves)
    v = route(fused_routing, SMALL, inputs).sum()
    graph = torch.autograd.grad(v, leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, graph, strict=True))
    assert all(g.requires_grad for g in graph)


@pytest.mark.skipif(
    not backends()["cpu"].usable, reason="the oracle alone casts under autocast as torch does"
)
def test_inside_autocast() -> None:
    """The oracle beneath the second derivative computes as outside: nothing is cast again."""
    inputs = make_inputs(SMALL, torch.float32)
    u = inputs["u"]
    v = route(fused_routing, SMALL, inputs).sum()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (first,) = torch.autograd.grad(v, u, create_graph=True)
            results.append(torch.autograd.grad(first.square().sum(), u, retain_graph=True)[0])
    assert torch.equal(*results)


def test_a_gradient_penalty_trains() -> None:
    """The penalty of WGAN-GP (Gulrajani et al. 2017): the gradient's length is pulled to 1."""
    torch.manual_seed(0)
    layer = CapsuleLinear(6, 4, 3, 4)
    u = torch.randn(8, 6, 4, requires_grad=True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    penalties = []
    for _ in range(30):
        score = layer(u).norm(dim=-1).sum()
        (slope,) = torch.autograd.grad(score, u, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
        penalties.append(penalty.item())
    assert penalties[-1] < 0.2 * penalties[0]


def test_a_penalty_on_a_jacobian_trains() -> None:
    inputs = make_inputs(SMALL, torch.float64)
    u, weight = inputs["u"], inputs["weight"]

    def slopes(function: Any) -> tuple[Tensor, ...]:
        jacobian = jacrev(lambda u: function(u, weight))(u)
        return torch.autograd.grad(jacobian.square().sum(), (u, weight))

    torch.testing.assert_close(slopes(fused_routing), slopes(reference_routing))


def as_it_is(function: Any, u: Tensor, *others: Tensor) -> Tensor:
    return function(u, *others)


def mapped(function: Any, u: Tensor, *others: Tensor) -> Tensor:
    return vmap(lambda sample: function(sample[None], *others)[0])(u)


def checkpointed(function: Any, *inputs: Tensor) -> Tensor:
    return checkpoint(function, *inputs, use_reentrant=False)


@pytest.mark.parametrize("around", [as_it_is, mapped, checkpointed])
@pytest.mark.parametrize("wanted", [("u",), ("weight", "bias"), ("u", "weight", "logits", "bias")])
def test_batched_gradients_have_gradients(wanted: tuple[str, ...], around: Any) -> None:
    """PyTorch's older vmap, which makes them, would lose the graph of an autograd.Function."""
    inputs = make_inputs(replace(SMALL, logits=True, bias=True), torch.float64)

    def slopes(function: Any) -> tuple[Tensor, ...]:
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        v = around(
            lambda u, weight, logits, bias: function(
                u, weight, logits=logits, bias=bias, leaky=True
            ),
            *leaves.values(),
        )
        rows = torch.eye(v.numel(), dtype=v.dtype).view(-1, *v.shape)
        jacobians = torch.autograd.grad(
            v, [leaves[name] for name in wanted], rows, is_grads_batched=True, create_graph=True
        )
        penalty = torch.stack([jacobian.square().sum() for jacobian in jacobians]).sum()
        return torch.autograd.grad(penalty, list(leaves.values()))

    torch.testing.assert_close(slopes(fused_routing), slopes(reference_routing))
