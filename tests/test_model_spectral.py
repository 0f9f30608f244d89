"""Convolutions by spectra: those of torch, their gradients, and when they are taken."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from model.spectral import (
    WORTH,
    SpectralConv2d,
    SpectralConvolution,
    matrices,
    share_of_direct,
    to_images,
)

from .tolerance import assert_as_good_as_reference

# B, C, O, image, kernel, stride
CASES = {
    "the paper's": (3, 70, 5, (20, 20), (9, 9), 2),  # more channels than are held at a time
    "dense": (2, 3, 4, (7, 6), (3, 3), 1),
    "a row is left over": (2, 3, 4, (12, 11), (4, 4), 2),
    "neither is square": (2, 2, 3, (13, 9), (5, 2), 3),
    "pixels between kernels": (2, 2, 3, (11, 11), (2, 2), 3),
    "small": (1, 2, 2, (5, 4), (3, 2), 2),
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


def test_gradients_of_both_orders() -> None:
    x, weight, stride = operands("small")
    assert torch.autograd.gradcheck(SpectralConvolution.apply, (x, weight, stride))
    assert torch.autograd.gradgradcheck(SpectralConvolution.apply, (x, weight, stride))


def test_float32_is_as_exact_as_the_convolution_of_torch() -> None:
    """Output and gradients of a batch, images and kernels of the paper's sizes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 64, 20, 20, generator=generator).relu().requires_grad_()
    weight = (0.01 * torch.randn(16, 64, 9, 9, generator=generator)).requires_grad_()
    wide = (t.detach().double().requires_grad_() for t in (x, weight))
    names = ("output", "grad_x", "grad_weight")
    every = (
        results(SpectralConvolution.apply, x, weight, 2),
        results(direct, x, weight, 2),
        results(direct, *wide, 2),
    )
    for name, ours, torchs, exact in zip(names, *every, strict=True):
        assert_as_good_as_reference(name, ours, torchs, exact)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_gradient_that_nobody_needs_is_not_computed(
    frozen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def counting(*arguments: Any) -> Tensor:
        made.append(1)
        return to_images(*arguments)

    def images_made(*inputs: Tensor) -> int:
        y = SpectralConvolution.apply(*inputs, 1)
        made.clear()
        y.sum().backward()
        return len(made)

    monkeypatch.setattr("model.spectral.to_images", counting)
    inputs = operands("dense")[:2]
    both = images_made(*inputs)
    inputs[frozen].requires_grad_(False)
    assert images_made(*inputs) == both / 2 == 1


def test_one_share_decides() -> None:
    """Of the multiplications of the paper's PrimaryCapsules, and where spectra do not pay."""
    pair = 148 * 4 / (36 * 81)  # for a pair of channels, transforms aside
    many = 2**20
    assert share_of_direct(many, many, many, (20, 20), (9, 9), 2) == pytest.approx(pair, rel=1e-3)
    transforms = (4 * 100 / 256 + 81 / 128 + 36 / (4 * 256) * 4) * 148 / (36 * 81)
    mnist = share_of_direct(128, 256, 256, (20, 20), (9, 9), 2)
    assert mnist == pytest.approx(pair + transforms, rel=1e-3)
    assert mnist < WORTH < share_of_direct(8, 256, 256, (20, 20), (9, 9), 2)
    assert share_of_direct(128, 256, 256, (104, 104), (9, 9), 2) > 1  # dense transforms
    assert share_of_direct(128, 64, 64, (20, 20), (9, 9), 2) > WORTH


def layers(padding: int = 0) -> tuple[nn.Conv2d, SpectralConv2d]:
    torch.manual_seed(0)
    usual, ours = nn.Conv2d(32, 256, 9, 2, padding), SpectralConv2d(32, 256, 9, 2, padding)
    ours.load_state_dict(usual.state_dict())
    return usual, ours


IMAGES = torch.randn(128, 32, 20, 20, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("padding", [0, 2])
def test_module_is_a_conv2d(padding: int) -> None:
    usual, ours = layers(padding)
    assert ours.pays(IMAGES)
    assert "SpectralConvolution" in str(ours(IMAGES).grad_fn.next_functions)
    torch.testing.assert_close(ours(IMAGES), usual(IMAGES), rtol=0, atol=1e-5)


def test_rounding_and_nan_are_of_an_image() -> None:
    """As the class says: spectra spread what is large or no number over an image, not further."""
    usual, ours = layers()
    x = IMAGES.clone()
    x[0, 0, 19, 19] = 1e6  # outside of every window
    x[1, 0, 10, 10] = torch.nan
    got, expected = ours(x), usual(x)
    assert (got[0] - expected[0]).abs().max() <= 1e6 * 1e-6
    assert got[1].isnan().all()
    torch.testing.assert_close(got[2:], expected[2:], rtol=0, atol=1e-5)


def in_forward_mode(layer: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))).primal


def under_autocast(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x)


ELSEWHERE: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "small batch": lambda layer, x: layer(x[:8]),
    "no batch": lambda layer, x: layer(x[:0]),
    "float64": lambda layer, x: layer.double()(x.double()),
    "autocast": under_autocast,
    "vmap": lambda layer, x: torch.func.vmap(layer)(x[None])[0],
    "forward mode": in_forward_mode,
    "export": lambda layer, x: torch.export.export(layer.eval(), (x,)).module()(x),
    "compile": lambda layer, x: torch.compile(layer, fullgraph=True, backend="eager")(x),
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_elsewhere_the_module_is_exactly_that_of_torch(where: str) -> None:
    usual, ours = layers()
    assert torch.equal(ELSEWHERE[where](ours, IMAGES), ELSEWHERE[where](usual, IMAGES))


def test_matrices_made_in_inference_mode_serve_training() -> None:
    matrices.cache_clear()
    _, ours = layers()
    with torch.inference_mode():
        ours(IMAGES)
    gradient = torch.autograd.grad(ours(IMAGES).sum(), ours.weight, create_graph=True)[0]
    assert torch.autograd.grad(ours(IMAGES).sum(), ours.weight)[0].equal(gradient)


@pytest.mark.parametrize("shape", [(128, 3, 20, 20), (128, 32, 8, 20), (3, 12)])
def test_refuses_what_torch_refuses(shape: tuple[int, ...]) -> None:
    x, (usual, ours) = torch.zeros(shape), layers()
    with pytest.raises(RuntimeError) as expected:
        usual(x)
    with pytest.raises(RuntimeError) as got:
        ours(x)
    assert str(got.value) == str(expected.value)
