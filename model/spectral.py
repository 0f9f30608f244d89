"""Strided convolutions with large kernels by way of spectra: a fifth of the multiplications.

A convolution is a product of spectra (Mathieu, Henaff, LeCun 2014, arXiv 1312.5851). For one
channel and with real matrices it is y = Y ((X x) * (W w)): X and W take the pixels of an image and
of a kernel to their spectra, Y takes a product of spectra to pixels. Over many channels each entry
becomes a matrix product, and these are most of the work that is left: 592 multiplications for a
pair of channels of the paper's PrimaryCapsules (9 x 9 kernels, stride 2, 6 x 6 outputs), not 2916.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

CHANNELS = 64
"""Of so many input channels the spectra are held at a time: they stay in a processor's cache."""
WORTH = 0.45
"""Below this share of the direct convolution's multiplications spectra are faster: products of
spectra run at the same rate, the transforms around them wait for memory."""

Size = tuple[int, int]


class Phase(NamedTuple):
    """The pixels (y, x) that leave one remainder by the stride.

    Between those of an image and those of a kernel a strided convolution is a dense one.
    """

    ys: slice
    xs: slice
    image: Size
    """Rows and columns of them in an image."""
    kernel: Size
    """Those in a kernel."""


class Geometry(NamedTuple):
    """A convolution of one channel as a sum over phases."""

    output: Size
    period: Size
    """Of the spectra: what the outputs depend on in a phase, so that none reaches around it."""
    phases: list[Phase]

    @classmethod
    def of(cls, image: Size, kernel: Size, stride: int) -> Self:
        output = ((image[0] - kernel[0]) // stride + 1, (image[1] - kernel[1]) // stride + 1)
        period = (output[0] + -(-kernel[0] // stride) - 1, output[1] + -(-kernel[1] // stride) - 1)
        phases = []
        for p, q in product(range(stride), repeat=2):
            ys = slice(p, p + stride * period[0], stride)
            xs = slice(q, q + stride * period[1], stride)
            sizes = (
                (len(range(*ys.indices(height))), len(range(*xs.indices(width))))
                for height, width in (image, kernel)
            )
            phases.append(Phase(ys, xs, *sizes))
        return cls(output, period, phases)


@lru_cache
def share_of_direct(B: int, C: int, O: int, image: Size, kernel: Size, stride: int) -> float:
    """Multiplications of a convolution by spectra, over those of the direct one.

    B images of C channels, O output channels.
    """
    output, period, phases = Geometry.of(image, kernel, stride)
    real = math.prod(2 - n % 2 for n in period)  # frequencies that are their own conjugates
    entries = real + 3 * (math.prod(period) - real) // 2
    transforms = B * O * math.prod(output)
    for phase in phases:
        transforms += B * C * math.prod(phase.image) + C * O * math.prod(phase.kernel)
    products = len(phases) * B * C * O
    return entries * (transforms + products) / (B * C * O * math.prod(output) * math.prod(kernel))


class Matrices(NamedTuple):
    """Of the dense convolution of one channel; spectra have E entries."""

    x: Tensor
    """[E, H * W], from an image."""
    w: Tensor
    """[E, kH * kW], from a kernel."""
    y: Tensor
    """[H' * W', E], to an output."""


def wave(frequency: Size, period: Size, size: Size) -> np.ndarray:
    """exp(-2 pi i (a y / N + b x / M)) at the pixels (y, x) of an image, complex [H * W]."""
    y, x = np.indices(size)
    angle = frequency[0] * y / period[0] + frequency[1] * x / period[1]
    return np.exp(-2j * np.pi * angle).ravel()


@lru_cache
def matrices(period: Size, image: Size, kernel: Size, output: Size) -> tuple[np.ndarray, ...]:
    """x, w and y of :class:`Matrices`, float64.

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


def parts(x: Tensor, geometry: Geometry) -> list[tuple[Any, Matrices]]:
    """The dense convolutions that are added up: of one phase and some channels each.

    An index, of the pixels in x [B, C, H, W] and of the taps in weight [O, C, kH, kW], and the
    matrices.
    """
    found = []
    for phase in geometry.phases:
        arrays = matrices(geometry.period, phase.image, phase.kernel, geometry.output)
        of_phase = Matrices(*(torch.from_numpy(array).to(x.dtype) for array in arrays))
        for c in range(0, x.shape[1], CHANNELS):
            found.append(((..., slice(c, c + CHANNELS), phase.ys, phase.xs), of_phase))
    return found


def to_spectra(matrix: Tensor, images: Tensor) -> Tensor:
    """[E, B, C] from a matrix [E, H * W] and images [B, C, H, W]."""
    B, C, H, W = images.shape
    return (matrix @ images.permute(2, 3, 0, 1).reshape(H * W, B * C)).view(-1, B, C)


def to_images(matrix: Tensor, spectra: Tensor, size: Sequence[int]) -> Tensor:
    """[B, C, H, W] from a matrix [H * W, E] and spectra [E, B, C]."""
    B, C = spectra.shape[1:]
    return (matrix @ spectra.flatten(1)).view(*size, B, C).permute(2, 3, 0, 1)


class SpectralConvolution(torch.autograd.Function):
    """:func:`torch.nn.functional.conv2d` of x [B, C, H, W] and weight [O, C, kH, kW], no padding.

    The backward computes spectra again: kept, they would take more memory than all else.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        image, kernel = (x.shape[2], x.shape[3]), (weight.shape[2], weight.shape[3])
        geometry = Geometry.of(image, kernel, stride)
        ctx.parts = parts(x, geometry)
        ctx.leaves_out = any(stride * p < n for p, n in zip(geometry.period, image, strict=True))
        Y: Tensor | None = None  # [E, B, O]
        for index, of in ctx.parts:
            X, W = to_spectra(of.x, x[index]), to_spectra(of.w, weight[index])
            Y = X @ W.mT if Y is None else Y.baddbmm_(X, W.mT)
        assert Y is not None
        return to_images(of.y, Y, geometry.output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        # All of it is written by some part, but for pixels of x that no window reaches.
        grad_x = (torch.zeros_like if ctx.leaves_out else torch.empty_like)(x)
        grad_weight = torch.empty_like(weight)
        grad_Y = to_spectra(ctx.parts[0][1].y.t(), grad)
        for index, of in ctx.parts:
            if ctx.needs_input_grad[0]:
                W, part = to_spectra(of.w, weight[index]), grad_x[index]
                part.copy_(to_images(of.x.t(), grad_Y @ W, part.shape[2:]))
            if ctx.needs_input_grad[1]:
                X, part = to_spectra(of.x, x[index]), grad_weight[index]
                part.copy_(to_images(of.w.t(), grad_Y.mT @ X, part.shape[2:]))
        wanted = ctx.needs_input_grad
        return grad_x if wanted[0] else None, grad_weight if wanted[1] else None, None


class SpectralConv2d(nn.Conv2d):
    """A square :class:`torch.nn.Conv2d` with bias that goes by spectra where that is faster.

    Parameters and checkpoints are those of ``nn.Conv2d``, and so are results, to a rounding of the
    largest value of an image (a NaN in it reaches all its outputs). Programs of ``torch.compile``
    and ``torch.export``, transforms of ``torch.func`` and forward mode have the usual convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int = 0
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)

    def pays(self, x: Tensor) -> bool:
        """Whether spectra are faster for this input; never for one that is refused."""
        # First, as a program must not depend on the size of a batch.
        if (
            torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
        ):
            return False
        if not (
            x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and x.dim() == 4
        ):
            return False
        B, C, H, W = x.shape
        padding, kernel = int(self.padding[0]), self.kernel_size
        image = (H + 2 * padding, W + 2 * padding)
        if B == 0 or self.in_channels != C or min(image) < kernel[0]:
            return False
        share = share_of_direct(B, C, self.out_channels, image, kernel, self.stride[0])
        return share < WORTH

    def forward(self, input: Tensor) -> Tensor:
        if not self.pays(input):
            return super().forward(input)
        padding = int(self.padding[0])
        x = F.pad(input, (padding,) * 4) if padding else input
        y = SpectralConvolution.apply(x, self.weight, self.stride[0])
        assert self.bias is not None  # as __init__ leaves it
        return y + self.bias[:, None, None]
