"""Strided convolutions with large kernels by way of spectra: a fifth of the multiplications.

A convolution is a product of spectra (Mathieu, Henaff, LeCun 2014, arXiv 1312.5851). For one
channel and with real matrices it is y = Y ((X x) * (W w)): X and W take the pixels of an image and
of a kernel to factors, Y takes their products back to pixels. Over many channels each product of
factors becomes a matrix product, and these are all the work that counts: 592 multiplications for a
pair of channels of the paper's PrimaryCapsules (9 x 9 kernels, stride 2, 6 x 6 outputs), not 2916.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = 64
"""Of so many input channels the factors are held at a time: they stay in a processor's cache."""
MIN_BATCH = 32
"""From this batch on, the kernels' factors cost less than what they save."""

Size = tuple[int, int]


class Factors(NamedTuple):
    """The real matrices of the convolution of one channel; F products of factors."""

    x: Tensor
    """[F, H * W], of an image."""
    w: Tensor
    """[F, kH * kW], of a kernel."""
    y: Tensor
    """[H' * W', F], from their products to an output."""
    output: Size
    """(H', W')."""


def wave(frequency: Size, period: Size, size: Size) -> np.ndarray:
    """exp(-2 pi i (a y / N + b x / M)) at the pixels (y, x) of an image, complex [H * W]."""
    y, x = np.indices(size)
    return np.exp(
        -2j * np.pi * (frequency[0] * y / period[0] + frequency[1] * x / period[1])
    ).ravel()


@cache
def factors(period: Size, image: Size, kernel: Size, output: Size) -> tuple[np.ndarray, ...]:
    """The matrices x, w, y of :class:`Factors` for images that repeat with a period.

    Of conjugate frequencies one is enough. Its complex product (a + ib)(c + id) takes three real
    ones (Gauss): (a + b) c, a (d - c) and b (c + d).
    """
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    done: set[Size] = set()
    for frequency in product(range(period[0]), range(period[1])):
        conjugate = (-frequency[0] % period[0], -frequency[1] % period[1])
        if conjugate in done:
            continue
        done.add(frequency)
        x = wave(frequency, period, image)
        w = wave(frequency, period, kernel).conj()  # as networks have it: kernels aren't mirrored
        y = wave(frequency, period, output).conj() / math.prod(period)
        if frequency == conjugate:
            rows.append((x.real, w.real, y.real))
            continue
        y = 2 * y  # the conjugate's share
        rows.append((x.real + x.imag, w.real, y.real - y.imag))
        rows.append((x.real, w.imag - w.real, -y.imag))
        rows.append((x.imag, w.real + w.imag, -y.real))
    x, w, y = (np.stack(row) for row in zip(*rows, strict=True))
    return x, w, np.ascontiguousarray(y.T)


def parts(x: Tensor, weight: Tensor, stride: int) -> list[tuple[Any, Factors]]:
    """The dense convolutions that a strided one is the sum of: an index and the matrices of each.

    Each is between some channels' pixels (y, x) that leave one remainder by the stride; the index
    is that of the pixels in x [B, C, H, W] and of the taps in weight [O, C, kH, kW].
    """
    image, kernel = x.shape[2:], weight.shape[2:]
    output = ((image[0] - kernel[0]) // stride + 1, (image[1] - kernel[1]) // stride + 1)
    # What the outputs depend on in a part: with this period none of them reaches around it.
    period = (output[0] + -(-kernel[0] // stride) - 1, output[1] + -(-kernel[1] // stride) - 1)
    found = []
    for p, q in product(range(stride), repeat=2):
        ys = slice(p, p + stride * period[0], stride)
        xs = slice(q, q + stride * period[1], stride)
        sizes = (tuple(t[..., ys, xs].shape[2:]) for t in (x, weight))
        X, W, Y = (torch.from_numpy(a).to(x.dtype) for a in factors(period, *sizes, output))
        matrices = Factors(X, W, Y, output)
        for c in range(0, x.shape[1], CHANNELS):
            found.append(((..., slice(c, c + CHANNELS), ys, xs), matrices))
    return found


def spectra(matrix: Tensor, images: Tensor) -> Tensor:
    """[F, B, C] from a matrix [F, H * W] and images [B, C, H, W]."""
    B, C, H, W = images.shape
    return (matrix @ images.permute(2, 3, 0, 1).reshape(H * W, B * C)).view(-1, B, C)


def pixels(matrix: Tensor, spectra: Tensor, size: Sequence[int]) -> Tensor:
    """Images [B, C, H, W] from a matrix [H * W, F] and spectra [F, B, C]."""
    B, C = spectra.shape[1:]
    return (matrix @ spectra.flatten(1)).view(*size, B, C).permute(2, 3, 0, 1)


class SpectralConvolution(torch.autograd.Function):
    """:func:`torch.nn.functional.conv2d` of x [B, C, H, W] and weight [O, C, kH, kW], no padding.

    The backward computes spectra again: kept, they would take more memory than all else.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.parts = parts(x, weight, stride)
        products: Tensor | None = None  # [F, B, O]
        for index, matrices in ctx.parts:
            X, W = spectra(matrices.x, x[index]), spectra(matrices.w, weight[index])
            products = X @ W.mT if products is None else products.baddbmm_(X, W.mT)
        assert products is not None
        return pixels(matrices.y, products, matrices.output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_products = spectra(ctx.parts[0][1].y.t(), grad)
        for index, matrices in ctx.parts:
            if grad_x is not None:
                W, part = spectra(matrices.w, weight[index]), grad_x[index]
                part.copy_(pixels(matrices.x.t(), grad_products @ W, part.shape[2:]))
            if grad_weight is not None:
                X, part = spectra(matrices.x, x[index]), grad_weight[index]
                part.copy_(pixels(matrices.w.t(), grad_products.mT @ X, part.shape[2:]))
        return grad_x, grad_weight, None


class SpectralConv2d(nn.Conv2d):
    """A square :class:`torch.nn.Conv2d` with bias that goes by spectra where that is faster.

    That is in float32 on CPUs, from batches of MIN_BATCH on. Parameters, results (to rounding) and
    checkpoints are those of ``nn.Conv2d``. Programs of ``torch.compile`` and ``torch.export`` and
    transforms of ``torch.func`` have the usual convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int = 0
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)

    def pays(self, x: Tensor) -> bool:
        """Whether spectra are faster for this input; never for one that is refused."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return False  # first: a program must not depend on the size of a batch
        return (
            x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and x.dim() == 4
            and x.shape[0] >= MIN_BATCH
            and x.shape[1] == self.in_channels
            and min(x.shape[2:]) + 2 * int(self.padding[0]) >= self.kernel_size[0]
        )

    def forward(self, input: Tensor) -> Tensor:
        if not self.pays(input):
            return super().forward(input)
        padding = int(self.padding[0])
        x = F.pad(input, (padding,) * 4) if padding else input
        y = SpectralConvolution.apply(x, self.weight, self.stride[0])
        assert self.bias is not None  # as __init__ leaves it
        return y + self.bias[:, None, None]
