"""What a network sees of a data set: windows onto images, drawn and cut on the training device.

Everything random comes from the generator given, so that a batch follows from its seed.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from .config import Config
from .data import Split


class Batch(NamedTuple):
    """``images`` [B, C, S, S] in 0..1, ``labels`` [B, T], ``originals`` [B, T, C, S, S].

    T is how many objects an image shows; ``originals`` are what reconstructions are compared with:
    each object alone.
    """

    images: Tensor
    labels: Tensor
    originals: Tensor


def window(images: Tensor, index: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """Square windows onto some of the images; what lies outside an image is 0.

    Args:
        images: [N, C, H, W].
        index: which of them, [B].
        top, left: where the window begins in its image, in pixels, may be negative, [B].
        size: side of the windows.

    Returns:
        [B, C, size, size]: ``out[b, c, y, x] = images[index[b], c, top[b] + y, left[b] + x]``.
    """
    _, C, H, W = images.shape
    steps = torch.arange(size, device=images.device)
    y, x = top[:, None] + steps, left[:, None] + steps  # [B, size]
    inside = ((y >= 0) & (y < H))[:, None, :, None] & ((x >= 0) & (x < W))[:, None, None, :]
    cut = images[
        index[:, None, None, None],
        torch.arange(C, device=images.device)[None, :, None, None],
        y.clamp(0, H - 1)[:, None, :, None],
        x.clamp(0, W - 1)[:, None, None, :],
    ]
    return cut * inside


def random_starts(
    count: int, native: int, size: int, shift: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Where ``count`` random windows begin (top, left), uniformly: [count] each.

    A window smaller than the image lies anywhere inside it, a larger one anywhere around it; then
    it is moved by up to ``shift`` pixels in each direction.
    """
    margin = native - size

    def draw() -> Tensor:
        start = uniform(min(margin, 0), max(margin, 0), count, generator)
        return start + uniform(-shift, shift, count, generator)

    return draw(), draw()


def uniform(low: int, high: int, count: int, generator: Generator) -> Tensor:
    """Whole numbers from low to high, both included: [count], on the generator's device."""
    return torch.randint(low, high + 1, (count,), generator=generator, device=generator.device)


def to_unit(images: Tensor) -> Tensor:
    """uint8 to float32 in 0..1."""
    return images.float() / 255


def training_batch(config: Config, split: Split, index: Tensor, generator: Generator) -> Batch:
    """A randomly placed view of each of the images ``index`` [B]."""
    native, size = split.images.shape[-1], config.architecture.image_size
    top, left = random_starts(len(index), native, size, config.shift_pixels, generator)
    return single(split, index, top, left, size)


def evaluation_batch(config: Config, split: Split, index: Tensor) -> Batch:
    """The one view by which each of the images ``index`` [B] is tested: the central one."""
    native, size = split.images.shape[-1], config.architecture.image_size
    start = torch.full_like(index, (native - size) // 2)
    return single(split, index, start, start, size)


def single(split: Split, index: Tensor, top: Tensor, left: Tensor, size: int) -> Batch:
    """Views that show one object each, T = 1."""
    images = to_unit(window(split.images, index, top, left, size))
    return Batch(images, split.labels[index, None], images.unsqueeze(1))
