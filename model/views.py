"""What a network sees of a data set, drawn and cut on the training device.

A view is a window onto one image, or onto two of different classes laid over each other. Everything
random comes from the generator given, so that a batch follows from its seed.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Generator, Tensor

from .augment import flip_some, jitter, standardize
from .config import Config
from .data import Split
from .windows import window

TEST_SEED = 20171026
"""Of the views that are drawn once for testing: the same in every run."""


class Batch(NamedTuple):
    """``images`` [B, C, S, S], ``labels`` [B, T], ``originals`` [B, T, C, S, S] in 0..1.

    T is how many objects an image shows; ``originals`` are what reconstructions are compared with:
    each object alone.
    """

    images: Tensor
    labels: Tensor
    originals: Tensor


@dataclass(frozen=True)
class Views:
    """``index``: which images, ``top`` and ``left``: where their windows begin; all [B, T]."""

    index: Tensor
    top: Tensor
    left: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, part: slice | Tensor) -> Self:
        return type(self)(self.index[part], self.top[part], self.left[part])

    def to(self, device: torch.device) -> Self:
        return type(self)(self.index.to(device), self.top.to(device), self.left.to(device))


def uniform(low: int, high: int, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Whole numbers from low to high, both included, on the generator's device."""
    return torch.randint(low, high + 1, shape, generator=generator, device=generator.device)


def other_class(split: Split, index: Tensor, generator: Generator) -> Tensor:
    """For each image [B] another one of the split, uniform among those of different class [B]."""
    by_class, start, count = split.class_blocks
    label = split.labels[index]
    # A place among all images of other classes, in order of class; jump over the own class's block.
    others = len(split) - count[label]
    share = torch.rand(index.shape, generator=generator, device=index.device, dtype=torch.float64)
    place = (share * others).long().minimum(others - 1)
    return by_class[place + torch.where(place >= start[label], count[label], 0)]


def random_views(
    config: Config, split: Split, index: Tensor, generator: Generator, shift: int
) -> Views:
    """Randomly placed views whose first object is ``index`` [B].

    A window smaller than the image lies anywhere inside it. A larger one lies anywhere around it,
    or, if it shows pairs, centrally. Then each is moved by up to ``shift`` pixels.
    """
    native, size = split.images.shape[-1], config.architecture.image_size
    margin = native - size
    if config.pairs:
        index = torch.stack([index, other_class(split, index, generator)], -1)
        low = high = margin // 2
    else:
        index = index.unsqueeze(-1)
        low, high = min(margin, 0), max(margin, 0)

    def draw() -> Tensor:
        shape = tuple(index.shape)
        return uniform(low, high, shape, generator) + uniform(-shift, shift, shape, generator)

    return Views(index, draw(), draw())


def random_in_tests(config: Config, split: Split) -> bool:
    """Whether test images are placed on a larger canvas, or over another one, at random."""
    return config.pairs or split.images.shape[-1] < config.architecture.image_size


def evaluation_views(config: Config, split: Split, repeats: int = 1) -> Views:
    """The views a network is tested on: the same in every run.

    Central windows, one for each image; but where their places are random, these are drawn once,
    ``repeats`` times for each image.
    """
    if not random_in_tests(config, split):
        return central_views(config, split)
    index = torch.arange(len(split)).repeat(repeats)
    generator = torch.Generator().manual_seed(TEST_SEED)
    shift = config.shift_pixels if config.pairs else 0
    # On the CPU, whose random numbers are not a GPU's: they would make another test.
    views = random_views(config, split.to("cpu"), index, generator, shift)
    return views.to(split.labels.device)


def central_views(config: Config, split: Split) -> Views:
    """One window onto each image alone, its middle on the image's; it may be larger."""
    index = torch.arange(len(split), device=split.labels.device).unsqueeze(-1)
    margin = split.images.shape[-1] - config.architecture.image_size
    start = torch.full_like(index, margin // 2)
    return Views(index, start, start)


def overlaid(objects: Tensor) -> Tensor:
    """Images [B, C, S, S] of objects [B, T, C, S, S] in 0..1 laid over each other, clipped at 1."""
    return objects.sum(1).clamp(max=1)


def show(config: Config, split: Split, views: Views, generator: Generator | None = None) -> Batch:
    """The images of views; with a generator, flipped and jittered where ``config`` says so."""
    size = config.architecture.image_size
    index, top, left = (x.flatten() for x in (views.index, views.top, views.left))
    objects = window(split.images, index, top, left, size).float() / 255  # [B * T, C, S, S]
    if generator is not None and config.flip:
        objects = flip_some(objects, generator)
    if generator is not None and config.jitter:
        objects = jitter(objects, generator)
    originals = objects.unflatten(0, tuple(views.index.shape))
    images = overlaid(originals)
    if config.standardize:
        images = standardize(images)
    return Batch(images, split.labels[views.index], originals)


def training_batch(config: Config, split: Split, index: Tensor, generator: Generator) -> Batch:
    """A random view of each of the images ``index`` [B]."""
    views = random_views(config, split, index, generator, config.shift_pixels)
    return show(config, split, views, generator)
