"""What other implementations got wrong: each test is named after a mistake, and would show it.

Every test runs the kernels against the mistake itself, written out, or a consequence of it.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from capsule_kernels import CapsuleLinear, fused_routing, reference_routing, squash
from model.capsnet import PrimaryCapsules

from .cases import Case, make_inputs, run
from .targets import EVERY, Target

CASE = Case()
"""Its kernels are those of other tests, too: Triton compiles anew for other sizes."""


tried: Counter[Target] = Counter()


@pytest.fixture(params=EVERY)
def target(request, figure) -> Iterator[Target]:
    yield request.param
    tried[request.param] += 1
    figure(f"mistakes of others, {request.param}", f"{tried[request.param]} cases tried")


@pytest.fixture(params=[1, 3, 20], ids=lambda B: f"B{B}")
def inputs(request, target) -> dict[str, Tensor]:
    return make_inputs(replace(CASE, B=request.param), torch.float32, target.device)


def route(target, u: Tensor, weight: Tensor, R: int = 3, **options):
    return fused_routing(u, weight, R, backend=target.backend, **options)


def wrong_routing(u: Tensor, weight: Tensor, R: int, softmax_dim: int, shared_b: bool) -> Tensor:
    """Procedure 1 with the softmax over another axis, or one b for the whole batch."""
    u_hat = torch.einsum("ijdk,bik->bijd", weight, u)
    b = u_hat.new_zeros(u_hat.shape[:3])
    for _ in range(R):
        v = squash(torch.einsum("bij,bijd->bjd", b.softmax(softmax_dim), u_hat))
        agreement = torch.einsum("bijd,bjd->bij", u_hat, v)
        b = b + (agreement.mean(0, keepdim=True) if shared_b else agreement)
    return v


def test_softmax_is_over_output_capsules(target, inputs):
    """Not over input capsules: c of one input capsule sums to 1."""
    u, weight = inputs["u"], inputs["weight"]
    v, c = route(target, u, weight, return_coupling=True)
    ones = torch.ones(u.shape[:2], device=u.device)
    torch.testing.assert_close(c.sum(2), ones)
    assert (c.sum(1) - 1).abs().max() > 0.1
    torch.testing.assert_close(v, wrong_routing(u, weight, 3, 2, False), rtol=1e-4, atol=1e-5)
    assert (v - wrong_routing(u, weight, 3, 1, False)).abs().max() > 0.01


def test_logits_are_of_each_sample(target, inputs):
    """Not shared over the batch: a sample alone is routed as it is in company."""
    u, weight = inputs["u"], inputs["weight"]
    v, c = route(target, u, weight, return_coupling=True)
    for b in range(len(u)):
        alone, c_alone = route(target, u[b : b + 1], weight, return_coupling=True)
        torch.testing.assert_close(v[b : b + 1], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(c[b : b + 1], c_alone, rtol=1e-4, atol=1e-5)
    if len(u) > 1:
        assert (v - wrong_routing(u, weight, 3, 2, True)).abs().max() > 1e-3
        assert (c[0] - c[1]).abs().max() > 0.01


def test_squash_is_over_the_capsule_dimension(target, inputs):
    """Not over capsules: each v is shorter than 1 and points where its s does."""
    u, weight = inputs["u"], inputs["weight"]
    v = route(target, u, weight, 1)
    s = torch.einsum("ijdk,bik->bjd", weight, u) / CASE.J
    assert (v.norm(dim=2) < 1).all()
    torch.testing.assert_close(torch.cosine_similarity(v, s, dim=2), torch.ones_like(v[..., 0]))
    squared = s.square().sum(2)
    torch.testing.assert_close(v.norm(dim=2), squared / (1 + squared), rtol=1e-4, atol=1e-5)


def test_squash_has_a_gradient_at_zero(target, inputs):
    """|s| in the denominator gives 0 / 0 there: here v = 0, and the gradient is exactly 0."""
    weight = inputs["weight"]
    u = torch.zeros_like(inputs["u"]).requires_grad_()
    v = route(target, u, weight)
    grad_u, grad_weight = torch.autograd.grad(v.sum(), (u, weight))
    assert not v.any()
    assert not grad_u.any()
    assert not grad_weight.any()


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-38, 1e-30, 1e-20, 1e-10])
def test_squash_has_a_gradient_near_zero(target, inputs, size):
    """1 / |s| or its derivative overflows for nearly dead capsules, NaN where a component is 0."""
    weight = inputs["weight"].detach().clone()
    weight[:, :, ::2] = 0
    weight.requires_grad_()
    u = torch.full_like(inputs["u"], size, requires_grad=True)
    v = route(target, u, weight)
    gradients = torch.autograd.grad(v.sum(), (u, weight))
    assert all(x.isfinite().all() for x in (v, *gradients))


def test_one_layer_serves_any_batch(target):
    """The batch size is no part of a layer or its parameters."""
    sizes = (CASE.I, CASE.K, CASE.J, CASE.D)
    layer = CapsuleLinear(*sizes, backend=target.backend).to(target.device)
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(20, CASE.I, CASE.K, generator=generator).to(target.device)
    whole = layer(u)
    for B in (0, 1, 2, 7, 20):
        v = layer(u[:B])
        assert v.shape == (B, CASE.J, CASE.D)
        torch.testing.assert_close(v, whole[:B], rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_the_agreements(target, inputs):
    """ "full" is the derivative of v; "last" is another thing, and both are what they say."""
    case = replace(CASE, B=len(inputs["u"]))
    full, last = (
        run(fused_routing, replace(case, routing_gradient=gradient), inputs, backend=target.backend)
        for gradient in ("full", "last")
    )
    assert torch.equal(full["v"], last["v"])
    # A step along u, by differences: the derivative is that of "full", not that of "last".
    wide = {name: None if x is None else x.detach().double() for name, x in inputs.items()}
    direction = torch.randn(wide["u"].shape, generator=torch.Generator().manual_seed(2)).double()
    direction = direction.to(target.device)
    grad_v = torch.randn(
        full["v"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    grad_v = grad_v.bfloat16().double().to(target.device)
    step = 1e-5
    ahead, behind = (
        reference_routing(wide["u"] + sign * step * direction, wide["weight"], CASE.R)
        for sign in (1, -1)
    )
    slope = ((ahead - behind) / (2 * step) * grad_v).sum()
    by_full = (full["grad_u"].double() * direction).sum()
    by_last = (last["grad_u"].double() * direction).sum()
    torch.testing.assert_close(by_full, slope, rtol=1e-3, atol=1e-4)
    assert (by_last - slope).abs() > 1e-2


def test_agreement_is_with_the_squashed_capsule(target):
    """u_hat . v, not u_hat . s: two aligned capsules, by hand."""
    u = torch.ones(1, 2, 1, device=target.device)
    weight = torch.tensor([[[[2.0]], [[0.0]]], [[[2.0]], [[0.0]]]], device=target.device)
    _, c = route(target, u, weight, 2, return_coupling=True)
    # s_1 = (2 + 2) / 2, v_1 = 4 / 5, agreement 2 v_1, c_1 = e^1.6 / (e^1.6 + 1).
    expected = torch.tensor([1.6, 0.0]).softmax(0).expand(1, 2, 2).to(target.device)
    torch.testing.assert_close(c, expected)


def test_primary_capsules_gather_channels_of_one_position():
    """A reshape of [B, C, H, W] without a permute makes capsules of neighbouring pixels."""
    layer = PrimaryCapsules(1, types=2, dim=4)
    with torch.no_grad():
        layer.convolution.weight.zero_()
        layer.convolution.weight[:, :, 0, 0] = torch.arange(1.0, 9.0).view(8, 1)
        layer.convolution.bias.zero_()
    image = torch.zeros(1, 1, 13, 13)
    image[0, 0, 2, 4] = 1  # seen by the output at row 1, column 2 of 3 x 3
    u = layer(image)
    lit = u[0].norm(dim=1).nonzero().flatten().tolist()
    assert lit == [5, 9 + 5]
    for capsule, channels in ((5, [1.0, 2.0, 3.0, 4.0]), (14, [5.0, 6.0, 7.0, 8.0])):
        torch.testing.assert_close(u[0, capsule], squash(torch.tensor(channels)))
