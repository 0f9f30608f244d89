"""Odd but right arguments: no samples, zeros, any strides, gradients of any subset."""

import itertools
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from capsule_kernels import fused_routing

from .cases import LAYOUTS, Case, make_inputs, run
from .targets import DTYPES, EVERY, KERNELS

EVERYTHING = Case(B=3, I=6, J=3, K=4, D=5, logits=True, bias=True, leaky=True, weight_sharing=2)


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R", [1, 3])
def test_an_empty_batch(target, dtype, R):
    case = replace(EVERYTHING, B=0, R=R)
    if not target.can_run(case, dtype):
        pytest.skip(f"{target} does not take {dtype}")
    inputs = make_inputs(case, dtype, target.device)
    results = run(fused_routing, case, inputs, backend=target.backend)
    assert results["v"].shape == (0, 3, 5)
    assert results["coupling"].shape == (0, 6, 3)
    for name, x in inputs.items():
        gradient = results[f"grad_{name}"]
        assert gradient.shape == x.shape
        assert gradient.dtype == dtype
        assert not gradient.any(), name


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B", [2, 20])
def test_capsules_of_zeros(target, dtype, B):
    """u = 0 and no bias: v is 0, and so is every gradient."""
    case = replace(EVERYTHING, B=B, bias=False)
    if not target.can_run(case, dtype):
        pytest.skip(f"{target} does not take {dtype}")
    inputs = make_inputs(case, dtype, target.device)
    with torch.no_grad():
        inputs["u"].zero_()
    results = run(fused_routing, case, inputs, backend=target.backend)
    coupling = results.pop("coupling")
    for name, x in results.items():
        assert not x.any(), name
    assert coupling.isfinite().all()


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", ["u", "weight", "logits", "bias"])
@pytest.mark.parametrize("B", [3, 20])
def test_strides_do_not_change_a_bit(target, layout, argument, B):
    case = replace(EVERYTHING, B=B)
    inputs = make_inputs(case, torch.float32, target.device)
    odd = LAYOUTS[layout](inputs[argument].detach())
    # Aligned on purpose in one, off by four bytes in the other.
    assert layout == "shifted" or not odd.is_contiguous()
    found = run(
        fused_routing, case, inputs | {argument: odd.requires_grad_()}, backend=target.backend
    )
    plain = odd.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    expected = run(fused_routing, case, inputs | {argument: plain}, backend=target.backend)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("B", [3, 20])
def test_gradients_of_any_strides(target, B):
    """``v.sum().backward()`` hands over a gradient of stride 0, a transposed consumer another."""
    inputs = make_inputs(replace(EVERYTHING, B=B), torch.float32, target.device)
    leaves = list(inputs.values())
    options = {"leaky": True, "weight_sharing": 2, "backend": target.backend}

    def v():
        return fused_routing(
            inputs["u"], inputs["weight"], logits=inputs["logits"], bias=inputs["bias"], **options
        )

    ones = torch.ones_like(v())
    by_sum = torch.autograd.grad(v().sum(), leaves)
    by_ones = torch.autograd.grad(v(), leaves, ones)
    assert all(map(torch.equal, by_sum, by_ones))
    generator = torch.Generator().manual_seed(0)
    grad_v = torch.randn(5, 3, B, generator=generator).to(target.device).permute(2, 1, 0)
    assert not grad_v.is_contiguous()
    odd = torch.autograd.grad(v(), leaves, grad_v)
    plain = torch.autograd.grad(v(), leaves, grad_v.contiguous())
    assert all(map(torch.equal, odd, plain))


NAMES = ("u", "weight", "logits", "bias")
SUBSETS = [subset for n in (1, 2, 3, 4) for subset in itertools.combinations(NAMES, n)]


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("gradient", ["full", "last"])
@pytest.mark.parametrize("B", [3, 20])
@pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)
def test_gradients_of_any_subset(target, gradient, B, wanted):
    """Each of the 15 subsets gets the very gradients of the whole, and nothing gets more.

    A test for each: Triton compiles a kernel for each, which processes then do side by side.
    """
    case = replace(EVERYTHING, B=B, routing_gradient=gradient)
    inputs = make_inputs(case, torch.float32, target.device)
    whole = run(fused_routing, case, inputs, backend=target.backend)
    for name, x in inputs.items():
        x.requires_grad_(name in wanted)
    found = run(fused_routing, case, inputs, backend=target.backend)
    assert {f"grad_{name}" for name in wanted} == found.keys() - {"v", "coupling"}
    for name in found:
        assert torch.equal(found[name], whole[name]), name


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_what_requires_a_gradient(target, mode):
    case = replace(EVERYTHING, logits=False, bias=False, leaky=False)
    inputs = make_inputs(case, torch.float32, target.device)
    with mode():
        v, coupling = fused_routing(
            inputs["u"],
            inputs["weight"],
            weight_sharing=2,
            return_coupling=True,
            backend=target.backend,
        )
    assert v.requires_grad == (mode is nullcontext)
    assert not coupling.requires_grad
    frozen = fused_routing(
        inputs["u"].detach(), inputs["weight"].detach(), weight_sharing=2, backend=target.backend
    )
    assert not frozen.requires_grad
    assert torch.equal(frozen, v)
