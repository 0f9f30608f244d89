"""Nothing is computed that no one asked for: masks of the backward, no graph without gradients."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from capsule_kernels import autograd, fused_routing
from capsule_kernels.ops import Operators

from .cases import Case, make_inputs
from .targets import NEEDS_KERNELS

pytestmark = NEEDS_KERNELS
CASE = Case(B=3, I=6, logits=True, bias=True)
SHARED = Case(B=20, I=12, weight_sharing=12, logits=True, bias=True)


def route(inputs: dict[str, Any]) -> Tensor:
    sharing = inputs["u"].shape[1] // inputs["weight"].shape[0]
    return fused_routing(
        inputs["u"],
        inputs["weight"],
        logits=inputs["logits"],
        bias=inputs["bias"],
        weight_sharing=sharing,
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Arguments of every call of the backward operator."""
    noted: list[tuple[Any, ...]] = []
    forward, backward = autograd.OPERATORS["cpu"]

    def noting(*arguments: Any) -> Any:
        noted.append(arguments)
        return backward(*arguments)

    monkeypatch.setitem(autograd.OPERATORS, "cpu", Operators(forward, noting))  # type: ignore[arg-type]
    return noted


@pytest.mark.parametrize("case", [CASE, SHARED], ids=str)
@pytest.mark.parametrize("wanted", [w for w in product([True, False], repeat=4) if any(w)])
def test_the_mask_is_what_requires_grad(
    wanted: tuple[bool, ...], case: Case, calls: list[tuple[Any, ...]]
) -> None:
    inputs = make_inputs(case, torch.float64)
    names = list(inputs)
    route(inputs).sum().backward()
    everything = {name: x.grad for name, x in inputs.items()}
    calls.clear()
    for name, want in zip(names, wanted, strict=True):
        inputs[name] = inputs[name].detach().requires_grad_(want)
    route(inputs).sum().backward()
    (arguments,) = calls
    assert arguments[8] == list(wanted)
    for name, want in zip(names, wanted, strict=True):
        assert (inputs[name].grad is not None) == want
        if want:
            torch.testing.assert_close(inputs[name].grad, everything[name])


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("wanted", [["u"], ["weight"], ["u", "bias"], ["logits", "weight"]])
@pytest.mark.parametrize("create_graph", [False, True])
def test_only_what_grad_is_asked_for(
    wanted: list[str], leaf: bool, create_graph: bool, calls: list[tuple[Any, ...]]
) -> None:
    """A trainable weight costs nothing where ``torch.autograd.grad`` wants the gradient of u."""
    inputs = make_inputs(CASE, torch.float64)
    if not leaf:
        inputs = {name: 1 * x for name, x in inputs.items()}
    expected = torch.autograd.grad(route(inputs).sum(), list(inputs.values()))
    calls.clear()
    v = route(inputs).sum()
    found = torch.autograd.grad(v, [inputs[name] for name in wanted], create_graph=create_graph)
    (arguments,) = calls
    assert arguments[8] == [name in wanted for name in inputs]
    everything = dict(zip(inputs, expected, strict=True))
    for name, gradient in zip(wanted, found, strict=True):
        torch.testing.assert_close(gradient, everything[name])


def test_only_the_inputs_that_backward_is_given(calls: list[tuple[Any, ...]]) -> None:
    inputs = make_inputs(CASE, torch.float64)
    route(inputs).sum().backward(inputs=[inputs["weight"]])
    (arguments,) = calls
    assert arguments[8] == [False, True, False, False]
    assert [name for name, x in inputs.items() if x.grad is not None] == ["weight"]


def test_no_graph_without_gradients() -> None:
    inputs = make_inputs(CASE, torch.float32)
    u, weight = inputs["u"], inputs["weight"]
    expected = fused_routing(u, weight)
    assert expected.grad_fn is not None
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            v, coupling = fused_routing(u, weight, return_coupling=True)
        assert not v.requires_grad
        assert torch.equal(v, expected)
        assert v.is_inference() == (mode is torch.inference_mode)
    assert fused_routing(u.detach(), weight.detach()).grad_fn is None
    _, coupling = fused_routing(u, weight, return_coupling=True)
    assert not coupling.requires_grad


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool, calls: list[tuple[Any, ...]]) -> None:
    inputs = make_inputs(CASE, torch.float64)
    leaves = (inputs["u"], inputs["weight"])
    expected = torch.autograd.grad(fused_routing(*leaves).square().sum(), leaves)
    v = checkpoint(fused_routing, *leaves, use_reentrant=use_reentrant)
    v.square().sum().backward()
    for x, gradient in zip(leaves, expected, strict=True):
        assert torch.equal(x.grad, gradient)
    assert len(calls) == 2


def test_the_graph_is_freed_and_can_be_kept() -> None:
    inputs = make_inputs(CASE, torch.float64)
    v = fused_routing(inputs["u"], inputs["weight"]).sum()
    first = torch.autograd.grad(v, inputs["u"], retain_graph=True)
    again = torch.autograd.grad(v, inputs["u"])
    assert torch.equal(first[0], again[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(v, inputs["u"])


def test_inputs_changed_in_place_are_noticed() -> None:
    inputs = make_inputs(CASE, torch.float64)
    weight = inputs["weight"]
    v = fused_routing(inputs["u"], weight).sum()
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        v.backward()


@pytest.mark.parametrize("case", [CASE, Case(B=20, I=6), SHARED, Case(B=3, I=3, R=1)], ids=str)
@pytest.mark.parametrize("full", [True, False])
def test_the_operator_gives_gradients_of_priors_that_are_left_out(case: Case, full: bool) -> None:
    """As of zeros, though nothing of this package asks for them."""
    inputs = make_inputs(case, torch.float64)
    u, weight = inputs["u"].detach(), inputs["weight"].detach()
    zeros = torch.zeros(case.I, case.J, dtype=torch.float64)
    forward, backward = autograd.OPERATORS["cpu"]
    sharing = case.weight_sharing
    v, s, _ = forward(u, weight, None, None, case.R, False, sharing, False)
    grad_v = torch.randn_like(v)

    def gradients(logits: Tensor | None) -> tuple[Tensor, ...]:
        return backward(grad_v, u, weight, logits, s, False, sharing, full, [True] * 4)

    torch.testing.assert_close(gradients(None), gradients(zeros))
