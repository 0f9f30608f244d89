"""Convolutions by spectra: those of torch, their gradients, and when they are taken."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.spectral import MIN_BATCH, SpectralConv2d, SpectralConvolution

# B, C, O, image, kernel, stride
CASES = {
    "the paper's": (3, 70, 5, (20, 20), (9, 9), 2),  # more channels than are held at a time
    "dense": (2, 3, 4, (7, 6), (3, 3), 1),
    "a row is left over": (2, 3, 4, (12, 11), (4, 4), 2),
    "neither is square": (2, 2, 3, (13, 9), (5, 2), 3),
    "pixels between kernels": (2, 2, 3, (11, 11), (2, 2), 3),
    "one output": (2, 2, 3, (9, 9), (9, 9), 2),
    "one pixel": (2, 2, 3, (4, 4), (1, 1), 1),
}


def operands(case: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, int]:
    B, C, O, image, kernel, stride = CASES[case]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, C, *image, generator=generator, dtype=torch.float64)
    weight = torch.randn(O, C, *kernel, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), stride


def results(f: Callable[..., Tensor], x: Tensor, weight: Tensor, stride: int) -> list[Tensor]:
    """Output and both gradients of a loss that is not linear."""
    y = f(x, weight, stride)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, weight))]


def direct(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return F.conv2d(x, weight, stride=stride)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_the_convolution_of_torch(case: str, memory_format: torch.memory_format) -> None:
    x, weight, stride = operands(case)
    x = x.detach().contiguous(memory_format=memory_format).requires_grad_()
    for got, expected in zip(
        results(SpectralConvolution.apply, x, weight, stride),
        results(direct, x, weight, stride),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("case", ["a row is left over", "neither is square"])
def test_gradients_of_both_orders(case: str) -> None:
    x, weight, stride = operands(case)
    assert torch.autograd.gradcheck(SpectralConvolution.apply, (x, weight, stride))
    assert torch.autograd.gradgradcheck(SpectralConvolution.apply, (x, weight, stride))


def test_float32_is_as_exact_as_the_convolution_of_torch() -> None:
    """Output and gradients at the paper's sizes, by the largest error from float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 256, 20, 20, generator=generator).relu().requires_grad_()
    weight = (0.01 * torch.randn(256, 256, 9, 9, generator=generator)).requires_grad_()
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    exact = results(direct, x64, weight64, 2)

    def errors(f: Callable[..., Tensor]) -> list[float]:
        pairs = zip(results(f, x, weight, 2), exact, strict=True)
        return [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]

    for ours, torchs in zip(errors(SpectralConvolution.apply), errors(direct), strict=True):
        assert ours <= 2 * torchs + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_a_gradient_that_nobody_needs_is_not_computed(frozen: str) -> None:
    x, weight, stride = operands("dense")
    (x if frozen == "x" else weight).requires_grad_(False)
    y = SpectralConvolution.apply(x, weight, stride)
    y.sum().backward()
    assert (x.grad is None, weight.grad is None) == (frozen == "x", frozen == "weight")


@pytest.mark.parametrize("padding", [0, 2])
def test_module_is_a_conv2d(padding: int) -> None:
    torch.manual_seed(0)
    usual = nn.Conv2d(3, 4, 5, stride=2, padding=padding)
    ours = SpectralConv2d(3, 4, 5, stride=2, padding=padding)
    ours.load_state_dict(usual.state_dict())
    x = torch.randn(MIN_BATCH, 3, 12, 12)
    assert ours.pays(x)
    assert "SpectralConvolution" in str(ours(x).grad_fn.next_functions)  # type: ignore[union-attr]
    torch.testing.assert_close(ours(x), usual(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["small batch", "float64", "autocast", "func", "compiled"])
def test_elsewhere_the_module_is_exactly_that_of_torch(case: str) -> None:
    torch.manual_seed(0)
    usual, ours = nn.Conv2d(3, 4, 5, stride=2), SpectralConv2d(3, 4, 5, stride=2)
    ours.load_state_dict(usual.state_dict())
    x = torch.randn(MIN_BATCH - 1 if case == "small batch" else MIN_BATCH, 3, 12, 12)
    if case == "float64":
        usual, ours, x = usual.double(), ours.double(), x.double()
    if case == "compiled":
        program = torch.export.export(ours.eval(), (x,)).module()
        assert torch.equal(program(x), usual(x))
        return
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        if case == "func":
            many = torch.func.vmap(ours)(x[None])[0]
            torch.testing.assert_close(many, usual(x), rtol=0, atol=1e-5)
        else:
            assert torch.equal(ours(x), usual(x))


@pytest.mark.parametrize("shape", [(MIN_BATCH, 2, 12, 12), (MIN_BATCH, 3, 4, 12), (3, 12)])
def test_refuses_what_torch_refuses(shape: tuple[int, ...]) -> None:
    x, usual, ours = torch.zeros(shape), nn.Conv2d(3, 4, 5, 2), SpectralConv2d(3, 4, 5, 2)
    with pytest.raises(RuntimeError) as expected:
        usual(x)
    with pytest.raises(RuntimeError) as got:
        ours(x)
    assert str(got.value) == str(expected.value)
