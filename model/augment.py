"""Random changes of pixels, and the standardisation of a network's input."""

import torch
from torch import Generator, Tensor

BRIGHTNESS = 0.25
"""Largest change of all pixels of an image, of a range of 1."""
CONTRAST = (0.5, 1.5)
"""Factors of the distances from an image's mean."""


def flip_some(images: Tensor, generator: Generator) -> Tensor:
    """Mirror every image [B, C, H, W] left to right with probability 1/2."""
    flipped = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return torch.where(flipped[:, None, None, None], images.flip(-1), images)


def jitter(images: Tensor, generator: Generator) -> Tensor:
    """Random brightness and contrast of every image [B, C, H, W] in 0..1."""

    def uniform(low: float, high: float) -> Tensor:
        share = torch.rand((len(images), 1, 1, 1), generator=generator, device=images.device)
        return low + (high - low) * share

    mean = images.mean((1, 2, 3), keepdim=True)
    stretched = (images - mean) * uniform(*CONTRAST) + mean
    return (stretched + uniform(-BRIGHTNESS, BRIGHTNESS)).clamp(0, 1)


def standardize(images: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 for every image [B, C, H, W]; uniform images become 0."""
    mean = images.mean((1, 2, 3), keepdim=True)
    deviation = images.std((1, 2, 3), correction=0, keepdim=True)
    # As much as 8-bit images with one pixel one level apart: noise is not blown up beyond it.
    smallest = images[0].numel() ** -0.5
    return (images - mean) / deviation.clamp_min(smallest)
